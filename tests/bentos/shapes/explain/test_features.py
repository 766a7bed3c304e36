"""Reading a patch's dictionary over HTTP: what it says is what the dictionary says."""

import asyncio
import base64
import io

import pytest
import torch
from PIL import Image as Pillow

from patches.engine.read import record
from patches.evidence.feature_cards import load_cards
from patches.families import clip
from patches.mechanisms.features import edit
from registry.home import home
from tests.bentos.conftest import dictionary
from tests.bentos.shapes.test_classify import LABELS, ask, coded, given, picture

SITE = clip.site("block", 1)


def activations(base):
    with record(base.model, [SITE]) as acts:
        clip.embed_images(base, [picture(0)])
    return dictionary(0).encode(acts[SITE][0][0])


def test_the_features_of_a_picture_are_the_dictionarys(pictures, tiny_clip):
    async def work():
        async with pictures() as s:
            body = {"image": {"data": coded(picture(0))}, "top": 5, "maps": True}
            got = (await s.http.post("/v1/explain/encode", json=body)).json()
            f = activations(tiny_clip)
            want = f.amax(0).topk(5)
            assert [x["feature"] for x in got["features"]] == want.indices.tolist()
            for x in got["features"]:
                torch.testing.assert_close(torch.tensor(x["map"]), f[:, x["feature"]], atol=1e-5, rtol=1e-5)
                assert x["edited"] == (x["feature"] % 2 == 0)
                assert len(x["words"]) == 3
            assert got["l0"] == pytest.approx(float((f > 0).sum(1).float().mean()))
            assert got["explained_variance"] < 1

    asyncio.run(work())


@pytest.mark.parametrize(("op", "value"), [("zero", 0.0), ("scale", 3.0), ("clamp", 2.0)])
def test_a_sweep_is_the_patch_at_each_strength(pictures, tiny_clip, op, value):
    async def work():
        async with pictures() as s:
            body = {
                "image": {"data": coded(picture(0))}, "labels": LABELS, "features": [2, 3, 9], "op": op, "value": value,
                "strengths": [0.0, 0.5, 1.0], "top": 4,
            }  # fmt: skip
            got = (await s.http.post("/v1/explain/steer", json=body)).json()
            largest = load_cards(home() / "artifacts" / s.digests[0]).largest[[2, 3, 9]]
            raw = value if op in ("zero", "scale") else value * largest
            weights = clip.logit_scale(tiny_clip) * clip.zero_shot(tiny_clip, LABELS)
            for row, strength in zip(got["sweep"], (0.0, 0.5, 1.0), strict=True):
                with edit(dictionary(0), SITE, [2, 3, 9], op, raw).apply(
                    tiny_clip.model, strength, root=tiny_clip.root
                ):
                    want = (clip.embed_images(tiny_clip, [picture(0)]) @ weights).softmax(1)[0]
                said = {x["label"]: x["probability"] for x in row["scores"]}
                assert [said[k] for k in LABELS] == pytest.approx(want.tolist(), abs=2e-5)
            # and nobody else noticed
            base = given(await ask(s, 1, model="base"))[0]
            plain = (clip.embed_images(tiny_clip, [picture(0)]) @ weights).softmax(1)[0]
            torch.testing.assert_close(base, plain, atol=2e-5, rtol=1e-4)

    asyncio.run(work())


def test_a_card_shows_words_and_pictures(pictures):
    async def work():
        async with pictures() as s:
            cards = load_cards(home() / "artifacts" / s.digests[0])
            listed = (await s.http.get("/v1/explain/features")).json()
            assert [c["feature"] for c in listed["data"]] == list(range(0, 40, 2))
            by_density = (await s.http.get("/v1/explain/features?order=density")).json()["data"]
            shares = [c["density"] for c in by_density]
            assert shares == sorted(shares, reverse=True)
            j = by_density[0]["feature"]
            card = (await s.http.get(f"/v1/explain/features/{j}")).json()
            assert card["density"] == pytest.approx(float(cards.density[j]))
            assert [w["word"] for w in card["words"]] == [cards.words[i] for i in cards.word[j].tolist()]
            raw = base64.b64decode(card["pictures"][0]["png"].partition(",")[2])
            assert Pillow.open(io.BytesIO(raw)).size == (48, 48)
            highest = [p["activation"] for p in card["pictures"]]
            assert highest == sorted(highest, reverse=True)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/explain/features/40", "0 to 39"), ("/v1/explain/features/-1", "numbers"),
        ("/v1/explain/features/x", "numbers"), ("/v1/explain/features?order=x", "order"),
        ("/v1/explain/features?model=base", "no dictionary"),
        ("/v1/explain/features?model=challenger", "no feature cards"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(pictures, path, says):
    async def work():
        async with pictures() as s:
            got = await s.http.get(path)
            assert 400 <= got.status_code < 500
            assert says in got.json()["error"]["message"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"features": [40]}, "40"), ({"features": []}, "features"), ({"features": [1, 1]}, "different"),
        ({"op": "explode"}, "op"), ({"strengths": [5.0]}, "strengths"), ({"labels": ["a", "a"]}, "twice"),
        ({"image": {"data": "!"}}, "base64"), ({"image": {"url": "http://x"}}, "data"), ({"tokens": "some"}, "tokens"),
        ({"value": 1e9}, "value"), ({"op": "clamp", "features": [99]}, "99"),
    ],
)  # fmt: skip
def test_bad_steering_is_told_why(pictures, change, says):
    async def work():
        async with pictures() as s:
            body = {"image": {"data": coded(picture(0))}, "labels": LABELS, "features": [1], **change}
            got = await s.http.post("/v1/explain/steer", json=body)
            assert 400 <= got.status_code < 500, got.text
            assert says in got.json()["error"]["message"], got.text

    asyncio.run(work())
