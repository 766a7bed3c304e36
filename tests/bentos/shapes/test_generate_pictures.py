"""`generate` with pictures and with what a request says to its mechanism, on the tiny LLaVA."""

import asyncio
import base64
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from patches import artifact
from patches.families.base import load_base
from patches.mechanisms import erase
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.experiment import CONTROL, TREATMENT
from registry.home import home
from tests.bentos.conftest import serving

SYSTEM = "vlm_erasure"


def data_url(seed=0, size=(40, 48), kind="PNG"):
    pixels = (np.random.default_rng(seed).random((*size, 3)) * 255).astype("uint8")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def show(*urls, text="hi"):
    parts = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def tiny_vlm():
    return load_base("tiny", "vlm")


@pytest.fixture
def seeing(home, tiny_vlm):
    @contextlib.asynccontextmanager
    async def run(**settings):
        digests = []
        objects = tuple("abcdefghijklmnopqrstuvwxyz")
        for depths, limit in (((0, 1), 1.0), ((2,), 0.0)):
            home.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=home))
            patch = erase.make(tiny_vlm, depths, weight=3.0, objects=objects, limit=limit, rounds=2)
            about = artifact.save(patch, SYSTEM, part, base=tiny_vlm.label)
            (home / "artifacts").mkdir(exist_ok=True)
            part.rename(home / "artifacts" / about.digest)
            digests.append(about.digest)
        async with serving(SYSTEM, digests, True, None, settings) as served:
            yield served

    return run


async def ask(s, messages, status=200, **more):
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
    got = await s.http.post("/v1/chat/completions", json=body)
    assert got.status_code == status, got.text
    return got.json()


def test_pictures_erasures_and_refusals(seeing):
    """One service, for it takes seconds to start: the OpenAI client, lists, auto, heat-maps, and every bad input."""

    async def work():
        async with seeing() as s:
            ai = openai.AsyncOpenAI(base_url="http://here/v1", api_key="none", http_client=s.http)
            how = {"model": "champion", "messages": show(data_url()), "max_tokens": 6, "temperature": 0}
            one = await ai.chat.completions.create(**how)
            assert one.usage.prompt_tokens > 16  # the picture's tokens are tokens
            parts = [p async for p in await ai.chat.completions.create(**how, stream=True)]
            text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
            assert text == one.choices[0].message.content
            await lists(s)
            await automatic(s)
            await refusals(s)

    asyncio.run(work())


async def lists(s):
    """Base beside patched in one batch; what was erased is told, and off is the base."""
    plain = await ask(s, show(data_url()), patchbay={"compare": True})
    said = {"erase": ["a", "cat"], "how": "each", "show": ["a"]}
    both = await ask(s, show(data_url()), patchbay={"compare": True, "ask": said})
    base, patched = both["choices"]
    assert base["message"] == plain["choices"][0]["message"]
    assert "patchbay" not in base
    told = patched["patchbay"]
    assert [(e["object"], e["as"]) for e in told["erased"]] == [("a", "its one token"), ("cat", "each token by itself")]
    assert {o["object"] for o in told["objects"]} == {"a", "cat"}
    assert told["heatmaps"]["a"].startswith("data:image/png;base64,")
    off = await ask(s, show(data_url()), patchbay={"ask": {"erase": "off"}})
    assert off["choices"][0]["message"] == plain["choices"][0]["message"]
    zero = await ask(s, show(data_url()), patchbay={"strength": 0.0, "ask": said})
    assert zero["choices"][0]["message"] == plain["choices"][0]["message"]
    many = [ask(s, show(data_url(i)), patchbay={"ask": {"erase": [chr(97 + i)]}}) for i in range(6)]
    together = await asyncio.gather(*many)
    alone = await ask(s, show(data_url(3)), patchbay={"ask": {"erase": ["d"]}})
    assert together[3]["choices"][0]["message"] == alone["choices"][0]["message"]


async def automatic(s):
    """Whatever is named is below the champion's limit of 1, so all is erased; the challenger believes all."""
    auto = {"ask": {"erase": "auto"}}
    got = (await ask(s, show(data_url()), patchbay=auto, model="champion"))["choices"][0]["patchbay"]
    assert set(got) == {"base", "objects", "erased"}
    assert all(not o["believed"] for o in got["objects"])
    assert {e["object"] for e in got["erased"]} == {o["object"] for o in got["objects"]}
    kept = (await ask(s, show(data_url()), patchbay=auto, model="challenger"))["choices"][0]["patchbay"]
    assert kept["erased"] == []
    body = {"messages": show(data_url()), "max_tokens": 4, "stream": True, "patchbay": auto}
    async with s.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line async for line in answer.aiter_lines()]
    assert '"patchbay":{"base"' in lines[0]
    three = (await ask(s, show(data_url()), patchbay=auto, model="champion", n=3))["choices"]
    assert [c["patchbay"]["erased"] == got["erased"] for c in three] == [True] * 3


async def refusals(s):
    """A 4xx for its own request that says why; the next request is answered."""
    png = data_url()
    bad = [
        (show("https://example.org/a.png"), {}, "image_url.url"),
        (show("data:image/png;base64,AAAA"), {}, "none of PNG"),
        (show("data:image/png;base64,!!!"), {}, "not base64"),
        (show(*[png] * 20), {}, "20 pictures"),
        (
            [{"role": "system", "content": show(png)[0]["content"]}, {"role": "user", "content": "x"}],
            {},
            "system message",
        ),
        (show(png), {"ask": {"erase": []}}, "erase"),
        (show(png), {"ask": {"erase": ["x"] * 1000}}, "erase"),
        (show(png), {"ask": {"erase": "all"}}, "erase"),
        (show(png), {"ask": {"delete": ["x"]}}, "delete"),
        (show(png), {"ask": {"erase": ["a", "größe"]}}, "'größe' is not in this model's vocabulary"),
        (show(png), {"ask": {"show": ["größe"]}}, "'größe' is not in this model's vocabulary"),
        ([{"role": "user", "content": "no picture"}], {"ask": {"erase": ["x"]}}, "no picture"),
        (show(data_url(size=(8, 400))), {}, "8 x 400|400 x 8"),
    ]
    import re

    for messages, said, why in bad:
        got = await ask(s, messages, status=400, patchbay=said)
        assert re.search(why, got["error"]["message"]), (why, got)
    tokens = await s.http.post("/v1/completions", json={"prompt": [[5, 98, 98, 6]], "max_tokens": 2})
    assert tokens.status_code == 400
    assert "no picture" in tokens.json()["error"]["message"]
    assert (await ask(s, show(png)))["choices"][0]["message"]["content"]


def test_a_caller_who_leaves_in_mid_stream_frees_the_row(seeing):
    async def work():
        async with seeing() as s:
            body = {"messages": show(data_url()), "max_tokens": 200, "ignore_eos": True, "stream": True,
                    "patchbay": {"ask": {"erase": ["a"]}}}  # fmt: skip
            async with s.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    break
            await s.until(lambda: s.runtime.queued == 0)
            assert (await ask(s, show(data_url())))["choices"]

    asyncio.run(work())


@pytest.mark.parametrize("mode", ["live", "shadow"])
def test_an_experiment_splits_requests_that_erase(seeing, mode):
    async def work():
        async with seeing() as s:
            words = [] if mode == "live" else ["mode=shadow"]
            x = experiments.begin(SYSTEM, control=s.digests[0], treatment=s.digests[1], share=0.5, words=words)
            ledgers.split(s.ledger, SYSTEM, experiments.plain(x))
            await s.until(lambda: s.runtime.table.experiment)
            body = {"messages": show(data_url()), "max_tokens": 6, "temperature": 0, "ignore_eos": True,
                    "patchbay": {"ask": {"erase": "auto"}}}  # fmt: skip
            sides = {}
            for unit in [f"user-{i}" for i in range(8 if mode == "live" else 1)]:
                got = await s.http.post("/v1/chat/completions", json=body, headers={"x-patchbay-unit": unit})
                side = got.headers["x-patchbay-arm"]
                assert side == (experiments.assign(x, unit) if mode == "live" else CONTROL)
                sides[side] = got.json()["choices"][0]
            if mode == "shadow":
                await s.until(lambda: s.app.state.desk.shadows)
                shadow = (await s.http.get("/v1/shadows")).json()["shadows"][0]
                want = (await ask(s, show(data_url()), patchbay=body["patchbay"], model="challenger"))["choices"][0]
                assert shadow[TREATMENT] == [want["message"]["content"]]
                return
            assert sides[CONTROL]["patchbay"]["erased"]  # believes nothing
            assert not sides[TREATMENT]["patchbay"]["erased"]  # believes all

    asyncio.run(work())


def test_a_model_of_text_refuses_pictures(service):
    async def work():
        async with service() as s:
            got = await s.http.post("/v1/chat/completions", json={"messages": show(data_url()), "max_tokens": 2})
            assert got.status_code == 400
            assert "sees no pictures" in got.json()["error"]["message"]

    asyncio.run(work())


assert home  # the fixture of the same name shadows it where a test needs a folder
