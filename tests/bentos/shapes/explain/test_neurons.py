"""Neurons over HTTP: what is said is what the cards and the model say; a bad row costs nobody else."""

import asyncio
import base64
import io

import pytest
import torch
from PIL import Image as Pillow

from patches.evidence.neuron_cards import Reader, attributes, load_neurons, mine, text_maps
from patches.families import clip
from registry.home import home
from tests.bentos.shapes.test_classify import coded, picture


def reader(s, base):
    return Reader.of(base, load_neurons(home() / "artifacts" / s.digests[0]))


def pixels(base, n=2):
    return base.processor.image([picture(i) for i in range(n)])


def asked(n=2, **more):
    return {"images": [{"data": coded(picture(i))} for i in range(n)], **more}


def test_a_card_shows_texts_carriers_and_pictures(neurons, tiny_clip):
    async def work():
        async with neurons() as s:
            listed = (await s.http.get("/v1/explain/neurons")).json()
            assert [c["neuron"] for c in listed["data"]] == list(range(0, 128, 2))
            assert all(c["edited"] and c["layer"] == 1 for c in listed["data"])
            assert listed["layers"] == {"0": 128, "1": 128}
            strong = (await s.http.get("/v1/explain/neurons?order=spread&layer=0")).json()["data"]
            spreads = [c["spread"] for c in strong]
            assert spreads == sorted(spreads, reverse=True)
            n = strong[0]["neuron"]
            card = (await s.http.get(f"/v1/explain/neurons/0/{n}")).json()
            assert not card["edited"]
            one = reader(s, tiny_clip).cards.layers[0]
            assert card["explained_all"] == pytest.approx(float(one.known.explained_all[n]))
            assert {w["text"] for w in card["texts"]} <= {"cat", "dog", "sun", "ink", "sea", "red fox"}
            sizes = [abs(w["coefficient"]) for w in card["texts"]]
            assert sizes == sorted(sizes, reverse=True)
            assert sum(c["share"] for c in card["carriers"]) <= 1.0001
            assert {c["layer"] for c in card["carriers"]} <= {1, 2}
            raw = base64.b64decode(card["pictures"][0]["png"].partition(",")[2])
            assert Pillow.open(io.BytesIO(raw)).size == (48, 48)

    asyncio.run(work())


def test_attributes_are_the_readers_and_change_with_the_patch(neurons, tiny_clip):
    async def work():
        async with neurons() as s:
            got = (
                await s.http.post("/v1/explain/attributes", json=asked(top=3, compare=True, model="champion"))
            ).json()["results"]
            want, count = attributes(reader(s, tiny_clip), pixels(tiny_clip), 3)
            for row, said, n in zip(got, want, count, strict=True):
                assert row["base"]["neurons_that_count"] == n
                assert [a["text"] for a in row["base"]["attributes"]] == [a.text for a in said]
                assert [a["weight"] for a in row["base"]["attributes"]] == pytest.approx(
                    [a.weight for a in said], rel=1e-3, abs=1e-5
                )
                assert "patched" in row  # an edit of effects leaves what neurons fire: the same answer

    asyncio.run(work())


@pytest.mark.parametrize("vote", ["raw", "signed"])
@pytest.mark.parametrize("against", [None, "dog"])
def test_maps_are_the_readers_in_every_format(neurons, tiny_clip, vote, against):
    async def work():
        async with neurons() as s:
            body = {
                "image": {"data": coded(picture(0))}, "text": "cat", "against": against, "neurons": 20, "vote": vote,
                "side": 32, "format": ["floats", "rle", "png"], "compare": True, "model": "champion",
            }  # fmt: skip
            texts = clip.embed_texts(tiny_clip, ["cat", "dog"], clip.TEMPLATES)
            maps = text_maps(reader(s, tiny_clip), pixels(tiny_clip, 1), texts, 20, vote)[0]
            got = (await s.http.post("/v1/explain/segment", json=body)).json()
            one = got["base"]
            want = maps[0] - maps[1] if against else maps[0]
            torch.testing.assert_close(torch.tensor(one["floats"]), want, atol=1e-4, rtol=1e-3)
            assert sum(one["rle"]["counts"]) == 32 * 32
            assert sum(one["rle"]["counts"][1::2]) == round(one["covered"] * 32 * 32)
            raw = one["png"].partition(",")[2]
            assert Pillow.open(io.BytesIO(base64.b64decode(raw))).size == (32, 32)
            assert got["patched"]["floats"] == one["floats"]  # an edit of effects leaves what neurons fire

    asyncio.run(work())


def test_mined_words_are_the_cards(neurons, tiny_clip):
    async def work():
        async with neurons() as s:
            body = {"true": "cat", "wrong": "ink", "neurons": 64, "blocked": ["red"], "synonym": 2.0}
            got = (await s.http.post("/v1/explain/mine", json=body)).json()
            t, w = clip.embed_texts(tiny_clip, ["cat", "ink"], clip.TEMPLATES)
            want, _ = mine(reader(s, tiny_clip).cards, t, w, 64, 30, ["red"], 2.0)
            assert [m["text"] for m in got["data"]] == [m.text for m in want]
            assert [m["weight"] for m in got["data"]] == pytest.approx([m.weight for m in want], rel=1e-3)
            assert "red fox" not in [m["text"] for m in got["data"]]

    asyncio.run(work())


def test_a_bad_picture_is_refused_for_its_own_row_only(neurons):
    async def work():
        async with neurons() as s:
            body = asked()
            body["images"].insert(1, {"data": "!"})
            got = (await s.http.post("/v1/explain/attributes", json=body)).json()["results"]
            assert ["error" in r for r in got] == [False, True, False]
            assert "base64" in got[1]["error"]["message"]
            alone = await s.http.post("/v1/explain/attributes", json={"images": [{"data": "!"}]})
            assert alone.status_code == 400

    asyncio.run(work())


def test_files_of_a_form_are_pictures_too(neurons):
    async def work():
        async with neurons() as s:
            raw = base64.b64decode(coded(picture(0)))
            form = await s.http.post("/v1/explain/attributes", files=[("images", ("a.png", raw, "image/png"))])
            assert form.status_code == 200
            json = await s.http.post("/v1/explain/attributes", json=asked(1))
            assert form.json()["results"] == json.json()["results"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/explain/neurons/1/128", "0 to 127"), ("/v1/explain/neurons/7/1", "cards of layer 7"),
        ("/v1/explain/neurons/x/1", "layer 'x'"), ("/v1/explain/neurons/1/-1", "neuron '-1'"),
        ("/v1/explain/neurons?order=x", "order"), ("/v1/explain/neurons?layer=9", "cards of layer 9"),
        ("/v1/explain/neurons?model=base", "no neuron cards"),
        ("/v1/explain/neurons?model=challenger", "no neuron cards"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(neurons, path, says):
    async def work():
        async with neurons() as s:
            got = await s.http.get(path)
            assert 400 <= got.status_code < 500
            assert says in got.json()["error"]["message"]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        ("segment", {"text": " "}, "text"), ("segment", {"side": 100000}, "side"),
        ("segment", {"vote": "loud"}, "vote"), ("segment", {"neurons": 0}, "neurons"), ("segment", {"way": "x"}, "way"),
        ("segment", {"threshold": "2"}, "threshold"), ("segment", {"format": ["svg"]}, "format"),
        ("segment", {"image": {"url": "http://x"}}, "data"), ("attributes", {"images": []}, "images"),
        ("attributes", {"top": 1000}, "top"), ("attributes", {"images": [{"data": "x", "model": "base"}]}, "model"),
        ("mine", {"wrong": "cat"}, "twice"), ("mine", {"true": " "}, "true"), ("mine", {"synonym": -1.0}, "synonym"),
        ("mine", {"blocked": ["a"] * 65}, "blocked"), ("mine", {"path": "/etc/passwd"}, "path"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_why(neurons, path, change, says):
    async def work():
        async with neurons() as s:
            body = {
                "mine": {"true": "cat", "wrong": "dog"},
                "segment": {"image": {"data": coded(picture(0))}, "text": "cat"},
            }.get(path, asked(1))
            got = await s.http.post(f"/v1/explain/{path}", json={**body, **change})
            assert 400 <= got.status_code < 500, got.text
            assert says in got.json()["error"]["message"], got.text

    asyncio.run(work())


def test_both_sides_are_told_to_the_scope_compare_alone(neurons, tokens):
    known = tokens(one={"name": "one", "scopes": ["explain"]}, both={"name": "both", "scopes": ["explain", "compare"]})

    async def work():
        async with neurons(tokens=known) as s:
            for token, status in (("one", 403), ("both", 200)):
                head = {"authorization": f"Bearer {token}"}
                for path, ask in (
                    ("attributes", asked(1, compare=True, model="champion")),
                    (
                        "segment",
                        {"image": {"data": coded(picture(0))}, "text": "cat", "compare": True, "model": "champion"},
                    ),
                ):
                    got = await s.http.post(f"/v1/explain/{path}", json=ask, headers=head)
                    assert got.status_code == status, got.text
                got = await s.http.post("/v1/explain/attributes", json=asked(1, compare=False), headers=head)
                assert got.status_code == 200

    asyncio.run(work())
