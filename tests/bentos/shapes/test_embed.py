"""Clips over HTTP: what a service says of them, whose answer it is, and what it refuses with the reason."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import tempfile
import zipfile
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from bentos.app import application
from bentos.runtime import Settings
from bentos.tokens import Tokens
from patches.families.base import load_base
from patches.families.video import decode, save
from patches.families.video.planted import motions
from patches.families.video.worker import WANTS
from registry import manifest
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.errors import NotReady
from registry.home import home
from registry.systems import SYSTEMS
from tests.asking import film, picture

MASKED, TOKENS = (next(n for n, row in SYSTEMS.items() if row.family == "video" and n.startswith(k)) for k in "vt")
BASES = {MASKED: "tiny:motions", TOKENS: "tiny:toto-motions"}


def seal(system: str, seed: int) -> str:
    """A checkpoint of other random weights as a sealed model; its digest."""
    model = motions("videomae" if system == MASKED else "toto").model
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    part = Path(tempfile.mkdtemp(dir=home()))
    save(model, part)
    base = load_base(BASES[system], "video")
    about = manifest.write(part, kind="model", system=system, base=base.label, config={})
    (home() / "artifacts").mkdir(exist_ok=True)
    if not (home() / "artifacts" / about.digest).exists():
        part.rename(home() / "artifacts" / about.digest)
    return about.digest


def served(system: str, work, count: int = 0, tokens: Tokens | None = None, **how):
    """Run `work(http, digests)` against a service of this system with so many checkpoints, the first one champion."""

    async def run():
        digests = [seal(system, i + 1) for i in range(count)]
        ledger = Ledger()
        if digests:
            ledgers.promote(ledger, system, digests[0])
        if len(digests) > 1:
            ledgers.challenge(ledger, system, digests[1])
        app = application(Settings(system, base=BASES[system], **how), tokens or Tokens(None))
        async with app.router.lifespan_context(app), contextlib.AsyncExitStack() as stack:
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            http = await stack.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60)
            )
            return await work(http, digests)

    return asyncio.run(run())


def shown(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def mask(size: int = 16) -> str:
    out = Image.new("L", (size, size), 0)
    out.paste(120, (2, 4, 8, 11))
    file = io.BytesIO()
    out.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_a_masked_model_answers_everything_it_can(home) -> None:
    wants = ["scores", "features", "tokens", "surprise", "reconstruction", "track"]

    async def work(http, _):
        got = await http.post("/v1/video", json={"clips": [{**film(), "mask": mask()}], "wants": wants, "layer": 1})
        assert got.status_code == 200, got.text
        return got.json()["results"][0]

    one = served(MASKED, work)
    assert len(one["scores"]) == 5
    assert sum(s["probability"] for s in one["scores"]) <= 1.0001
    assert len(one["features"]["mean"]) == 16
    assert one["tokens"]["shape"] == [8, 16]
    assert len(one["surprise"]["by_frame"]) == 4
    assert one["sampling"] == {
        "frames": [0, 2, 5, 7],
        "seconds": [0.0, 0.16, 0.4, 0.56],
        "decoded": 8,
        "size": [16, 16],
    }
    assert one["reconstruction"]["borrows"] == "what does not move"
    assert shown(one["reconstruction"]["animation"]).n_frames == 4
    assert shown(one["reconstruction"]["strip"]).size[0] == 4 * 48
    assert len(one["track"]["masks"]) == 4
    assert shown(one["track"]["masks"][0]).mode == "P"


def test_a_model_of_tokens_rolls_out_and_says_what_surprised_it(home) -> None:
    async def work(http, _):
        ask = {"clips": [film()], "wants": ["rollout", "surprise"], "given": 1, "temperature": 1.0, "seed": 3}
        asks = (ask, ask, {**ask, "expected": True})
        return [(await http.post("/v1/video", json=one)).json()["results"][0] for one in asks]

    a, b, mean = served(TOKENS, work)
    assert a == b  # the seed decides
    assert a["rollout"]["drawn"] == 3
    assert shown(a["rollout"]["animation"]).n_frames == 4
    assert a["surprise"]["unit"] == "nats a token"
    assert mean["rollout"]["expected"]
    assert mean["rollout"]["strip"] != a["rollout"]["strip"]


def test_arms_are_models_and_base_stands_beside_checkpoint(home) -> None:
    async def work(http, digests):
        ask = {"clips": [film()], "wants": ["scores"], "patchbay": {"compare": True}}
        both = (await http.post("/v1/video", json=ask)).json()["results"][0]
        alone = {}
        for arm in ("base", "challenger"):
            got = await http.post("/v1/video", json={"clips": [film()]}, headers={"x-patchbay-arm": arm})
            alone[arm] = got.json()["results"][0]
        mixed = await http.post("/v1/video", json={"clips": [film(), {**film(), "model": "base"}]})
        return digests, both, alone, mixed.json()["results"]

    digests, both, alone, mixed = served(MASKED, work, 2)
    assert both["patch"] == digests[1], "of a comparison that names nobody, the challenger"
    assert both["base"]["scores"] == alone["base"]["scores"]
    assert both["scores"] != both["base"]["scores"]
    assert alone["challenger"]["patch"] == digests[1]
    assert mixed[1]["scores"] == alone["base"]["scores"]


def test_memory_is_told_by_arm_and_capped(home) -> None:
    async def work(http, digests):
        return digests, (await http.get("/v1/models")).json()["patchbay"]

    digests, about = served(MASKED, work, 2)
    assert about["memory"].keys() == {"base", *digests}
    own = sum(4 * p.numel() for p in motions("videomae").model.parameters())
    assert all(own <= about["memory"][name] < 1.1 * own for name in about["memory"])

    async def none_fits(http, digests):
        return (await http.get("/v1/models")).json()["patchbay"]

    with pytest.raises(NotReady, match=r"needs .* GiB beside the base; 1e-06 GiB are allowed .*PATCHBAY_ARM_GIB"):
        served(MASKED, none_fits, 1, arm_gib=1e-6)


def test_frames_files_and_forms_are_the_same_clip(home) -> None:
    gif = Image.open(io.BytesIO(base64.b64decode(film()["data"])))
    frames, archive = [], io.BytesIO()
    with zipfile.ZipFile(archive, "w") as held:
        for t in range(gif.n_frames):
            gif.seek(t)
            file = io.BytesIO()
            gif.convert("RGB").save(file, "PNG")
            frames.append(base64.b64encode(file.getvalue()).decode())
            held.writestr(f"{t:02d}.png", file.getvalue())

    async def work(http, _):
        three = [{"frames": frames}, {"data": base64.b64encode(archive.getvalue()).decode()}]
        got = (await http.post("/v1/video", json={"clips": three})).json()["results"]
        form = await http.post("/v1/video", files={"clips": ("a.gif", base64.b64decode(film()["data"]), "image/gif")})
        return [*got, form.json()["results"][0]]

    a, b, c = served(MASKED, work)
    for other in (b, c):  # another batch rounds otherwise
        assert [s["label"] for s in other["scores"]] == [s["label"] for s in a["scores"]]
        assert [s["probability"] for s in other["scores"]] == pytest.approx([s["probability"] for s in a["scores"]])


def test_embeddings_are_openais(home) -> None:
    gif, png = f"data:image/gif;base64,{film()['data']}", f"data:image/png;base64,{picture()['data']}"

    async def work(http, _):
        plain = (await http.post("/v1/embeddings", json={"input": [gif, png, gif], "model": "base"})).json()
        packed = (await http.post("/v1/embeddings", json={"input": gif, "encoding_format": "base64"})).json()
        short = (await http.post("/v1/embeddings", json={"input": gif, "dimensions": 4})).json()
        long = await http.post("/v1/embeddings", json={"input": gif, "dimensions": 99})
        return plain, packed, short, long

    plain, packed, short, long = served(MASKED, work)
    vectors = [torch.tensor(d["embedding"]) for d in plain["data"]]
    assert [d["index"] for d in plain["data"]] == [0, 1, 2]
    assert torch.equal(vectors[0], vectors[2])
    assert all(float(v.norm()) == pytest.approx(1.0, abs=1e-5) for v in vectors)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert torch.allclose(torch.frombuffer(bytearray(raw), dtype=torch.float32), vectors[0])
    assert len(short["data"][0]["embedding"]) == 4
    assert long.status_code == 400
    assert "this model has 16" in long.text


def zipped(*names: str, size: int = 16) -> dict[str, str]:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as held:
        for name in names:
            file = io.BytesIO()
            Image.new("RGB", (size, size)).save(file, "PNG")
            held.writestr(name, file.getvalue())
    return {"data": base64.b64encode(out.getvalue()).decode()}


def text(value: bytes) -> dict[str, str]:
    return {"data": base64.b64encode(value).decode()}


BAD = {
    "no base64": ({"data": "???"}, 400, "not base64"),
    "no clip": (text(b"once upon a time" * 9), 400, "no video|cannot be"),
    "cut off": (text(base64.b64decode(film()["data"])[:40]), 400, "cannot be read|needs 4"),
    "a way out": (zipped("../../a.png", "b.png"), 400, "lies outside"),
    "too short": (film(2), 400, "2 frames .* needs 4"),
    "8K": (zipped("a.png", "b.png", "c.png", "d.png", size=8000), 413, "8000 x 8000 pixels"),
    "neither": ({}, 400, "either data .* or frames"),
    "both": ({**film(), "frames": [picture()["data"]] * 4}, 400, "either data .* or frames"),
    "one frame": ({"frames": [picture()["data"]]}, 400, "at least 2"),
    "no frames": (zipped("a.txt"), 400, "no pictures"),
    "two sizes": ({"frames": [picture()["data"], picture(size=24)["data"]]}, 400, "one size"),
}


def test_bad_clips_are_refused_with_the_reason_and_their_neighbours_are_answered(home) -> None:
    import re

    async def work(http, _):
        for name, (clip, status, why) in BAD.items():
            got = await http.post("/v1/video", json={"clips": [clip]})
            assert got.status_code == status, f"{name}: {got.status_code} {got.text[:200]}"
            assert re.search(why, got.text), f"{name}: {got.text[:300]}"
        clips = [film(), BAD["a way out"][0], film()]
        return (await http.post("/v1/video", json={"clips": clips})).json()["results"]

    a, b, c = served(MASKED, work)
    assert a["scores"] == c["scores"]
    assert b["error"]["code"] == 400


def test_bad_films_are_refused_and_one_of_a_changing_rate_is_sampled_by_time(home) -> None:
    import re

    pytest.importorskip("av")
    from tests.patches.families.video import test_decode as films

    bad = {
        "cut off": (films.film()[:400], 400, "cut off|no video|no frames"),
        "audio alone": (films.sound(), 400, "no video stream"),
        "no frames at all": (films.unframed(), 400, "no video|no frames"),
        "a header of ten hours": (films.claimed(36_000), 413, "3[56][0-9]{3} s"),
        "shorter than the model's": (films.film(2), 400, "2 frames .* needs 4"),
    }

    async def work(http, _):
        for name, (raw, status, why) in bad.items():
            got = await http.post("/v1/video", json={"clips": [text(raw)]})
            assert got.status_code == status, f"{name}: {got.status_code} {got.text[:200]}"
            assert re.search(why, got.text), f"{name}: {got.text[:300]}"
        uneven = films.film(8, times=[0, 10, 20, 30, 350, 500, 700, 1000], container="matroska")
        return (await http.post("/v1/video", json={"clips": [text(uneven)]})).json()["results"][0]

    # a third of the second each, not of the frames: 0, .333, .667, 1
    assert served(MASKED, work)["sampling"]["frames"] == [0, 4, 6, 7]


ASKED = {
    "no future": ({"wants": ["rollout"]}, "predicts no future"),
    "no mask": ({"wants": ["track"]}, "wants a mask"),
    "layer": ({"wants": ["features"], "layer": 40}, r"to 2\."),
    "nothing": ({"wants": []}, "at least 1"),
    "unknown": ({"wants": ["poems"]}, "Input should be"),
    "start": ({"wants": ["scores"], "start": -1}, "greater than or equal"),
}


@pytest.mark.parametrize("system", [MASKED, TOKENS])
def test_each_arm_says_what_it_can_answer_and_answers_just_that(home, system) -> None:
    async def work(http, digests):
        out = []
        for model in ("base", f"sha256:{digests[0]}"):
            about = (await http.get("/v1/video", params={"model": model})).json()
            assert (about["frames"], about["size"]) == (4, 16)
            for want in WANTS:
                body = {"clips": [{**film(), "mask": mask()}], "wants": [want], "model": model}
                out.append((want in about["wants"], (await http.post("/v1/video", json=body)).status_code))
        assert (await http.get("/v1/video", params={"model": "sha256:00"})).status_code == 404
        return out

    said = served(system, work, 1)
    assert {status for can, status in said if can} == {200}
    assert {status for can, status in said if not can} == {400}


def test_wishes_a_model_cannot_grant_are_refused(home) -> None:
    import re

    async def work(http, _):
        for name, (more, why) in ASKED.items():
            got = await http.post("/v1/video", json={"clips": [film()], **more})
            assert got.status_code == 400, f"{name}: {got.status_code}"
            assert re.search(why, got.text), f"{name}: {got.text[:300]}"

    served(MASKED, work)


def test_300_megabytes_are_refused_while_they_arrive(home) -> None:
    async def body():
        for _ in range(300):
            yield b"x" * (1 << 20)

    async def work(http, _):
        got = await http.post("/v1/video", content=body(), headers={"content-type": "application/json"})
        assert got.status_code == 413

    served(MASKED, work)


def test_the_decoders_death_is_one_clips_and_the_service_lives(home, tmp_path, monkeypatch) -> None:
    (tmp_path / "child.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    whole = decode.CHILD

    async def work(http, _):
        monkeypatch.setattr(decode, "CHILD", tmp_path / "child.py")
        dead = await http.post("/v1/video", json={"clips": [film()]})
        monkeypatch.setattr(decode, "CHILD", whole)
        return dead, await http.post("/v1/video", json={"clips": [film()]})

    dead, alive = served(MASKED, work)
    assert dead.status_code == 400
    assert "decoder ended (signal 9)" in dead.text
    assert alive.status_code == 200
