"""Captions over HTTP: jobs with the best so far, scores at once, arms, restarts, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from dataclasses import asdict
from types import SimpleNamespace

import httpx
import pytest
import torch

from bentos.app import application
from bentos.runtime import Settings
from bentos.tokens import Tokens
from patches.families import clip, llm
from patches.families.base import load_base
from patches.families.search import wav
from patches.families.search.bank import FILE
from patches.families.search.config import SearchConfig
from registry import manifest
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.home import home
from tests.asking import film, picture
from tests.patches.families.search.world import LINES

IMAGE = picture()["data"]


def seal(config: SearchConfig) -> str:
    """A sealed search on the tiny bases in home()/artifacts; its digest."""
    (home() / "artifacts").mkdir(exist_ok=True, parents=True)
    part = home() / "part"
    part.mkdir(exist_ok=True)
    (part / FILE).write_text("\n".join(LINES) + "\n")
    bases = {"scorer": clip.FAMILY.tiny(0).label, "generator": llm.FAMILY.tiny(0).label}
    about = manifest.write(part, kind="search", system="mils", bases=bases, config=asdict(config))
    part.rename(home() / "artifacts" / about.digest)
    return about.digest


@contextlib.asynccontextmanager
async def serving(*configs: SearchConfig, tokens: Tokens | None = None):
    digests = [seal(c) if not isinstance(c, str) else c for c in configs]
    if Ledger().head("mils") is None:
        ledgers.promote(Ledger(), "mils", digests[0])
        for d in digests[1:]:
            ledgers.challenge(Ledger(), "mils", d)
    app = application(Settings("mils", base="tiny,tiny"), tokens or Tokens(None))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=60) as http:
            yield SimpleNamespace(http=http, digests=digests, runtime=app.state.desk.runtime)


async def ended(http, id):
    for _ in range(600):
        got = (await http.get(f"/v1/jobs/{id}")).json()
        if got["state"] not in ("queued", "running"):
            return got
        await asyncio.sleep(0.05)
    raise AssertionError("it never ended")


SHORT, LONG = SearchConfig(keep=6, ask=6, steps=3), SearchConfig(keep=6, ask=6, steps=90)


def test_a_caption_is_searched_for_followed_and_compared():
    async def go():
        async with serving(SHORT, LONG) as s:
            body = {"image": IMAGE, "model": "champion", "patchbay": {"compare": True}}
            made = await s.http.post("/v1/captions", json=body)
            assert made.status_code == 202, made.text
            assert made.headers["x-patchbay-patch"] == s.digests[0]
            stream = (await s.http.get(f"/v1/jobs/{made.json()['id']}/events")).text
            events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: ")]
            scores = [e["best"]["score"] for e in events[:-1] if e.get("best")]
            assert scores == sorted(scores)
            assert len(scores) == 4
            for e in events[:-1]:
                if e.get("best"):
                    ranked = [c["score"] for c in e["best"]["candidates"]]
                    assert ranked == sorted(ranked, reverse=True)
                    assert e["best"]["candidates"][0]["text"] == e["best"]["text"]
            result = events[-1]["result"]
            assert result["curve"] == sorted(result["curve"])
            assert result["score"] >= result["base"]["score"]
            assert result["candidates"][0]["text"] == result["text"]
            waited = await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 30, "budget": {"steps": 1}})
            assert waited.status_code == 200
            assert waited.json()["result"]["steps"] == 1
            again = await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 30})
            assert again.json()["result"]["trace"] == result["trace"]
            clip_job = await s.http.post("/v1/captions", json={"clip": film()["data"], "wait": 30})
            assert clip_job.json()["state"] == "done", clip_job.text
            base = await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 30, "model": "base"})
            assert base.json()["result"]["steps"] == 0
            arms = (await s.http.get("/v1/captions")).json()["arms"]
            assert {a["steps"] for a in arms.values()} == {0, 3, 90}

    asyncio.run(go())


def test_cancelling_stops_a_search_within_a_second():
    async def go():
        async with serving(LONG) as s:
            id = (await s.http.post("/v1/captions", json={"image": IMAGE})).json()["id"]
            for _ in range(200):
                if (await s.http.get(f"/v1/jobs/{id}")).json()["best"]:
                    break
                await asyncio.sleep(0.05)
            start = time.perf_counter()
            got = (await s.http.delete(f"/v1/jobs/{id}")).json()
            assert got["state"] == "cancelled"
            for _ in range(100):
                if not s.runtime.queued:
                    break
                await asyncio.sleep(0.01)
            assert time.perf_counter() - start < 1.0

    asyncio.run(go())


def test_a_search_survives_the_service_and_ends_with_the_same_trace():
    async def first():
        async with serving(SearchConfig(keep=6, ask=6, steps=30)) as s:
            whole = (await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 60})).json()
            id = (await s.http.post("/v1/captions", json={"image": IMAGE})).json()["id"]
            while not (await s.http.get(f"/v1/jobs/{id}")).json()["best"]:
                await asyncio.sleep(0.01)
            return whole["result"]["trace"], id, s.digests[0]

    trace, id, digest = asyncio.run(first())

    async def second():
        async with serving(digest) as s:
            got = await ended(s.http, id)
            assert got["state"] == "done", got
            assert got["result"]["trace"] == trace

    asyncio.run(second())


def test_scores_of_given_texts_are_a_clipscore():
    async def go():
        async with serving(SHORT) as s:
            texts = ["a cat", "a dog on sand", "a cat"]
            got = (await s.http.post("/v1/mils/score", json={"image": IMAGE, "texts": texts})).json()
            scores = [r["score"] for r in got["scores"]]
            assert scores[0] == scores[2]
            assert got["scores"][0]["clipscore"] == pytest.approx(2.5 * max(scores[0], 0), abs=1e-5)
            base = clip.FAMILY.tiny(0)
            from patches.families.pictures import read

            x = clip.embed_images(base, base.processor.image(read(IMAGE)))[0]
            want = (clip.embed_texts(base, texts) @ x).tolist()
            assert scores == pytest.approx(want, abs=1e-5)

    asyncio.run(go())


SOUND = base64.b64encode(wav.encode(torch.zeros(800) + 0.1, 8000)).decode()
BAD = [
    ({}, "nothing was sent"),
    ({"image": IMAGE, "sound": SOUND}, "given a picture with a sound"),
    ({"image": IMAGE, "clip": IMAGE}, "image and clip were sent"),
    ({"sound": SOUND}, "looks at pictures and wants a picture or a clip; it was given a sound"),
    ({"goal": "a cat"}, "it was given a goal"),
    ({"image": IMAGE, "style": IMAGE}, "it was given a picture and a style. Ask"),
    ({"minus": ["a cat"]}, "minus was sent"),
    ({"style": IMAGE}, "style was sent"),
    ({"plus": [IMAGE] * 9}, "plus"),
    ({"sound": IMAGE}, "no WAVE file"),
    ({"image": SOUND}, "none of PNG"),
    ({"image": "???"}, "base64"),
    ({"image": IMAGE, "budget": {"ask": 10_000}}, "budget.ask"),
    ({"image": IMAGE, "budget": {"ask": 900}}, "budget.ask=900"),
    ({"image": IMAGE, "budget": {"seconds": -3}}, "budget.seconds"),
    ({"image": IMAGE, "budget": {"calls": 0}}, "budget.calls"),
    ({"image": IMAGE, "generator": "http://evil/v1"}, "generator"),
    ({"image": IMAGE, "patchbay": {"ask": {"x": 1}}}, "patchbay.ask"),
    ({"image": IMAGE, "model": "nobody"}, "no model or arm"),
]


def test_what_cannot_be_searched_for_is_refused_and_leaves_no_job():
    async def go():
        async with serving(SHORT) as s:
            for body, says in BAD:
                got = await s.http.post("/v1/captions", json=body)
                assert 400 <= got.status_code < 500, (body, got.text)
                assert says in got.json()["error"]["message"], (says, got.text)
            assert (await s.http.get("/v1/jobs")).json()["data"] == []

    asyncio.run(go())


def test_sums_and_prompts_are_asked_of_arms_that_take_them():
    """picture + picture - word over HTTP; the inputs that a job keeps are those it began with."""
    from bentos.shapes.described import Media, decoded, packed, restored

    made = decoded(Media(plus=[IMAGE, IMAGE], minus=["a cat"]), clip.FAMILY.tiny(0).processor)
    again = restored(json.loads(json.dumps(packed(made))))
    assert again["minus"] == ["a cat"]
    assert all(torch.equal(a, b) for a, b in zip(again["plus"], made["plus"], strict=True))
    sound = restored(packed(decoded(Media(sound=SOUND), None)))["sound"]
    assert sound[1] == 8000

    async def go():
        sums = SearchConfig(task="arithmetic", keep=6, ask=6, steps=2)
        draws = load_base("tiny:0", "diffusion").label
        prompts = SearchConfig(task="prompt", keep=2, ask=2, steps=1, lines=3, renderer=draws, drawn=1)
        async with serving(sums, prompts) as s:
            body = {"plus": [IMAGE, picture(1)["data"]], "minus": ["a cat"], "wait": 30}
            got = (await s.http.post("/v1/captions", json=body)).json()
            assert got["state"] == "done", got
            assert got["result"]["curve"] == sorted(got["result"]["curve"])
            body = {"goal": "a cat", "model": "challenger", "wait": 60}
            drawn = (await s.http.post("/v1/captions", json=body)).json()
            assert drawn["state"] == "done", drawn
            assert drawn["result"]["calls"] == 6
            unfit = await s.http.post("/v1/captions", json={"image": IMAGE, "model": "challenger"})
            assert "it was given a picture or a clip" in unfit.json()["error"]["message"]
            both = {"goal": "a cat", "model": "challenger", "patchbay": {"compare": True}}
            refused = await s.http.post("/v1/captions", json=both)
            assert refused.status_code == 400
            assert "The base looks at pictures" in refused.json()["error"]["message"]

    asyncio.run(go())


def test_our_own_generate_with_an_arm_proposes(monkeypatch, tmp_path):
    """A patched language model behind another service of ours, over a real port: the arm is asked, its tokens count."""
    import threading

    import uvicorn

    from patches import artifact
    from patches.mechanisms.sink import SinkConfig, SinkEdit

    tiny = llm.FAMILY.tiny(0)
    edit = SinkEdit(SinkConfig(neurons=((0, 3), (0, 9), (1, 2)), keep_first=False), {})
    about = artifact.save(edit, "attention_sink", tmp_path / "arm", base=tiny.label)
    (home() / "artifacts").mkdir(exist_ok=True, parents=True)
    (tmp_path / "arm").rename(home() / "artifacts" / about.digest)
    ledgers.promote(Ledger(), "attention_sink", about.digest)
    app = application(Settings("attention_sink", base="tiny"), Tokens(None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        monkeypatch.setenv("PATCHBAY_GENERATOR_URL", f"http://127.0.0.1:{port}/v1")
        from patches.families.search.endpoint import Endpoint, Where

        short = SearchConfig(generator="endpoint", keep=3, ask=2, steps=1)
        made = {}
        for model in ("base", f"sha256:{about.digest[:16]}", "nobody"):
            monkeypatch.setenv("PATCHBAY_GENERATOR_MODEL", model)
            made[model] = Endpoint(Where.from_environment()).call("Write lines.", 2, 0, short)
        patched = made[f"sha256:{about.digest[:16]}"]
        assert patched.tokens > 0
        assert not patched.down
        assert made["nobody"].down
        monkeypatch.setenv("PATCHBAY_GENERATOR_MODEL", "champion")

        async def go():
            async with serving(short) as s:
                got = (await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 60})).json()
                assert got["state"] == "done", got
                assert got["result"]["tokens"] > 0

        asyncio.run(go())
    finally:
        server.should_exit = True
        thread.join(10)


def test_an_endpoint_that_is_down_fails_the_job_which_can_be_resumed(monkeypatch):
    monkeypatch.setenv("PATCHBAY_GENERATOR_URL", "http://127.0.0.1:9/v1")

    async def go():
        async with serving(SearchConfig(generator="endpoint", keep=6, ask=6, steps=2)) as s:
            got = (await s.http.post("/v1/captions", json={"image": IMAGE, "wait": 30})).json()
            assert got["state"] == "failed"
            assert "cannot be reached" in got["error"]["message"]
            assert got["resumable"]
            assert got["best"]["text"] in LINES

    asyncio.run(go())
