"""Pictures over HTTP: OpenAI's own client works, every row keeps its arm and its ask, a bad one costs nobody else."""

import asyncio
import base64
import functools
import io
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from PIL import Image as Pillow

from patches import artifact
from patches.engine.patch import apply
from patches.families import diffusion
from patches.families.diffusion import Denoiser, Denoising
from patches.mechanisms.direction import DirectionConfig, DirectionEdit
from registry.home import home as home_folder
from tests.bentos.conftest import serving

SYSTEM = "diffusion_cf"


def ran(work):
    """A test that is a coroutine."""

    @functools.wraps(work)
    def test(*args, **more):
        asyncio.run(work(*args, **more))

    return test


@pytest.fixture(scope="module")
def tiny():
    return diffusion.tiny(0)


def direction(seed, tuned=None):
    """tuned: (site, module) of a denoiser that the edit brings an update of."""
    g = torch.Generator().manual_seed(seed)
    means = torch.nn.functional.normalize(torch.randn(4, 24, generator=g), dim=1)
    names, domains = ("cat", "dog", "sun", "ink"), ("pets", "pets", "things", "things")
    tensors = {"means": means}
    if tuned is not None:
        site, module = tuned
        tensors |= {f"a.{site}": torch.randn(2, module.in_features, generator=g)}
        tensors |= {f"b.{site}": torch.randn(module.out_features, 2, generator=g)}
    return DirectionEdit(DirectionConfig("given.image", names, domains), tensors)


@pytest.fixture
def service(home, tiny):
    """`async with service() as s`: two direction edits, the first one champion, the second challenger (tuned, if a site
    and its module are given)."""

    @asynccontextmanager
    async def run(tuned=None, **settings):
        (home_folder() / "artifacts").mkdir(parents=True, exist_ok=True)
        digests = []
        for seed in (1, 2):
            part = Path(tempfile.mkdtemp(dir=home_folder()))
            about = artifact.save(direction(seed, tuned if seed == 2 else None), SYSTEM, part, base=tiny.label)
            part.rename(home_folder() / "artifacts" / about.digest)
            digests.append(about.digest)
        async with serving(SYSTEM, digests, True, None, settings) as served:
            yield served

    return run


def coded(seed=0, size=16):
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Pillow.fromarray(noise).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels(data):
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


async def post(s, path, **body):
    return await s.http.post(path, json=body)


@ran
async def test_openais_client_draws_and_edits(service, tiny):
    async with service() as s:
        client = openai.AsyncOpenAI(api_key="-", base_url="http://here/v1", http_client=s.http)
        how = {"patchbay": {"steps": 3, "seed": 5}}
        made = await client.images.generate(prompt="a cat", n=2, size="16x16", model="base", extra_body=how)
        rows = [Denoising(condition=tiny.model.text(["a cat"])[0], guidance=3.0, steps=3, seed=5 + i) for i in range(2)]
        with apply(tiny.model, {}, root=tiny.root) as on:
            Denoiser(type("S", (), {"base": tiny, "applied": on})()).run(rows)
        for one, row in zip(made.data, rows, strict=True):
            want = (row.picture.permute(1, 2, 0) * 255).round().numpy()
            assert np.abs(pixels(one.b64_json) - want).max() <= 1
        file = ("a.png", base64.b64decode(coded()), "image/png")
        edited = await client.images.edit(
            image=file, prompt=" ", model="champion", extra_body={"patchbay": {"ask": {"target": "dog"}, "levels": 2}}
        )
        assert pixels(edited.data[0].b64_json).shape == (16, 16, 3)
        assert (await s.http.get("/v1/models")).json()["data"]


@ran
async def test_rows_of_one_sample_are_what_each_is_alone(service):
    rows = [
        {"image": coded(1), "steps": 2, "seed": 3, "ask": {"target": "dog", "amount": 2.0}},
        {"image": coded(1), "steps": 2, "seed": 3, "ask": {"target": "ink", "source": "sun"}},
        {"image": coded(1), "steps": 4, "seed": 3, "model": "base", "solver": "dpm++"},
        {"image": coded(1), "steps": 2, "seed": 3, "model": "challenger"},
        {"prompt": "sun", "steps": 3, "strength": 0.5, "guidance": 1.0},
    ]
    async with service() as s:
        together = (await post(s, "/v1/render/sample", rows=rows)).json()["data"]
        for row, got in zip(rows, together, strict=True):
            alone = (await post(s, "/v1/render/sample", rows=[row])).json()["data"][0]
            assert np.abs(pixels(alone["b64_json"]) - pixels(got["b64_json"])).max() <= 1
        assert np.abs(pixels(together[0]["b64_json"]) - pixels(together[1]["b64_json"])).max() > 1
        assert [x["arm"] for x in together][2:4] == ["base", "challenger"]


@ran
async def test_a_bad_row_is_refused_in_words_and_its_neighbour_is_drawn(service):
    bad = [
        ({"ask": {"target": "whale"}}, "Classes: cat, dog"),
        ({"ask": {"target": "dog", "source": "sun"}}, "within one domain"),
        ({"ask": {"target": "dog", "amount": 1e9}}, "amount"),
        ({"ask": {"target": "dog", "colour": "red"}}, "colour"),
        ({"steps": 0}, "steps"),
        ({"guidance": 1e9}, "guidance"),
        ({"image": "AAAA"}, "picture"),
        ({"model": "auto"}, ""),
    ]
    async with service() as s:
        rows = [{"image": coded(), "steps": 2, **b} for b, _ in bad] + [{"image": coded(), "steps": 2}]
        got = (await post(s, "/v1/render/sample", rows=rows)).json()["data"]
        for one, (_, words) in zip(got, bad, strict=False):
            if words:
                assert words in one["error"]["message"]
        assert got[-1]["b64_json"]
        for body, code in (
            ({"prompt": " "}, 400), ({"prompt": "a", "size": "9000x9000"}, 413), ({"prompt": "a", "size": "24x24"},
            400), ({"prompt": "a", "n": 99}, 400), ({"prompt": "a", "response_format": "url"}, 400),
            ({"prompt": "a", "patchbay": {"steps": 10**6}}, 400), ({"prompt": "a", "patchbay": {"strength": 1e9}}, 400),
        ):  # fmt: skip
            assert (await post(s, "/v1/images/generations", **body)).status_code == code, body


@ran
async def test_base_stands_beside_patched_and_progress_is_told(service):
    async with service() as s:
        body = {"prompt": "cat", "patchbay": {"compare": True, "steps": 4, "seed": 1}}
        got = (await post(s, "/v1/images/generations", **body)).json()
        assert [x["arm"] for x in got["data"]] == ["base", "challenger"]
        assert (
            pixels(got["data"][0]["b64_json"]).tolist() == pixels(got["data"][1]["b64_json"]).tolist()
        )  # no image told
        events = (await post(s, "/v1/images/generations", **body, stream=True)).text
        assert events.count("image_generation.progress") > 2
        assert events.count("event: image_generation.completed") == 2
        assert "patchbay.done" in events


@ran
async def test_a_counterfactual_begins_at_the_picture_and_grows_with_the_sweep(service):
    async with service() as s:
        body = {"image": coded(), "levels": 4, "method": "edict", "ask": {"target": "dog"}}
        sweep = {"name": "amount", "values": [0.0, 0.5, 2.0]}
        got = (await post(s, "/v1/render/counterfactual", **body, sweep=sweep)).json()
        assert got["sweep"] == "amount"
        change = [x["l1"] for x in got["data"]]
        assert change[0] < 1e-3 < change[1] < change[2]
        strip = await s.http.post(
            "/v1/render/counterfactual", json={**body, "sweep": sweep}, headers={"accept": "image/png"}
        )
        assert Pillow.open(io.BytesIO(strip.content)).size == (16 * 4 + 4 * 3, 16)
        pair = (await post(s, "/v1/render/edit", **body)).json()["data"]
        assert [x["arm"] for x in pair] == ["base", "champion"]
        assert (await post(s, "/v1/render/counterfactual", ask={"target": "dog"})).status_code == 400
        far = {"name": "strength", "values": [9.0]}
        assert (await post(s, "/v1/render/counterfactual", **body, sweep=far)).status_code == 400


@ran
async def test_a_picture_is_inverted_once_and_swept_by_its_job(service):
    async with service() as s:
        made = (await post(s, "/v1/render/invert", image=coded(), levels=3, method="o_belm")).json()
        assert made["state"] in ("queued", "running", "done")
        for _ in range(200):
            job = (await s.http.get(f"/v1/jobs/{made['id']}")).json()
            if job["state"] not in ("queued", "running"):
                break
            await asyncio.sleep(0.05)
        assert job["state"] == "done", job
        sweep = {"values": [0.0]}
        got = await post(s, "/v1/render/counterfactual", inverted=made["id"], sweep=sweep)
        assert got.json()["data"][0]["l1"] < 1e-3
        assert (await post(s, "/v1/render/counterfactual", inverted="0" * 24)).status_code == 404
        assert (await post(s, "/v1/render/point", ask={})).status_code == 400
        about = (await s.http.get("/v1/render")).json()
        assert about["arms"]["champion"]["names"]["classes"] == ["cat", "dog", "sun", "ink"]
        assert "target" in about["arms"]["champion"]["ask"]["properties"]


@ran
async def test_a_tuned_arm_gives_the_picture_back_where_it_moves_nothing(service, tiny):
    """Inverted and drawn by the same denoiser, as a request and as a job; the base beside it by its own."""
    layers = ((n, m) for n, m in tiny.model.named_modules() if n.endswith("attn1.to_v"))
    async with service(tuned=next(layers)) as s:
        body = {"image": coded(), "levels": 4, "method": "edict"}
        still = {"ask": {"target": "dog", "amount": 0.0}}
        pair = (await post(s, "/v1/render/edit", **body, **still, model="challenger")).json()["data"]
        want = pixels(coded())
        assert [x["arm"] for x in pair] == ["base", "challenger"]
        for one in pair:
            assert np.abs(pixels(one["b64_json"]) - want).max() <= 1, one["arm"]
        moved = await post(s, "/v1/render/edit", **body, ask={"target": "dog"}, model="challenger")
        assert np.abs(pixels(moved.json()["data"][1]["b64_json"]) - want).max() > 1
        made = (await post(s, "/v1/render/invert", **body, model="challenger")).json()
        while (await s.http.get(f"/v1/jobs/{made['id']}")).json()["state"] in ("queued", "running"):
            await asyncio.sleep(0.05)
        sweep = {"name": "amount", "values": [0.0, 2.0]}
        again = {"inverted": made["id"], "ask": {"target": "dog"}, "sweep": sweep}
        ours, plain = [
            (await post(s, "/v1/render/counterfactual", **again, model=m)).json()["data"]
            for m in ("challenger", "champion")
        ]
        assert ours[0]["l1"] < 1e-3 < ours[1]["l1"]
        assert plain[0]["l1"] > 1e-3  # another arm's denoiser does not undo this inversion
