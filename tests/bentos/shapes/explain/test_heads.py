"""The shape `heads`: what is told is what the decomposition says; what is refused is told why."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from patches.evidence.gallery import load_gallery
from patches.families import clip
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from tests.bentos.shapes.test_classify import coded, picture

SYSTEM = "clip_heads"


def asking(work, heads):
    async def whole():
        async with heads() as s:
            return await work(s)

    return asyncio.run(whole())


def test_a_decomposition_adds_up_and_is_the_lens_s_own(heads, tiny_clip):
    async def work(s):
        body = {"image": {"data": coded(picture(0))}, "texts": ["cat", "dog"], "model": "base", "vectors": True}
        got = (await s.http.post("/v1/explain/decompose", json=body)).json()
        T = clip.embed_texts(tiny_clip, ["cat", "dog"]).T
        parts = Lens(tiny_clip).read(tiny_clip.processor.image([picture(0)]))
        want = (parts.heads / parts.norm[0])[0] @ T
        torch.testing.assert_close(torch.tensor(got["heads"]), want, atol=1e-5, rtol=1e-4)
        total = torch.tensor(got["heads"]).sum((0, 1)) + torch.tensor(got["mlps"]).sum(0) + torch.tensor(got["bias"])
        torch.testing.assert_close(total, torch.tensor(got["cosine"]), atol=1e-5, rtol=1e-4)
        assert got["rest"] < 1e-5
        raw = np.frombuffer(base64.b64decode(got["vectors"]["float16"]), np.float16).reshape(got["vectors"]["shape"])
        torch.testing.assert_close(torch.tensor(raw).float(), (parts.heads / parts.norm[0])[0], atol=1e-3, rtol=1e-2)
        both = (await s.http.post("/v1/explain/decompose", json={**body, "model": "champion", "compare": True})).json()
        torch.testing.assert_close(torch.tensor(both["base"]["heads"]), want, atol=1e-5, rtol=1e-4)
        assert both["heads"] != both["base"]["heads"]

    asking(work, heads)


def test_a_segmentation_comes_as_floats_runs_and_a_picture(heads, tiny_clip):
    async def work(s):
        body = {
            "image": {"data": coded(picture(1))},
            "text": "cat",
            "model": "base",
            "format": ["floats", "rle", "png"],
        }
        got = (await s.http.post("/v1/explain/segment", json={**body, "side": 64})).json()
        lens = Lens(tiny_clip)
        x = tiny_clip.processor.image([picture(1)])
        t = clip.embed_texts(tiny_clip, ["cat", "dog"])
        want = maps.grid(lens, x, t)[0]
        torch.testing.assert_close(torch.tensor(got["floats"]), want[0], atol=1e-5, rtol=1e-4)
        assert sum(got["rle"]["counts"]) == 64 * 64
        inside = sum(got["rle"]["counts"][1::2])
        assert inside / 64**2 == pytest.approx(got["covered"])
        seen = Pillow.open(io.BytesIO(base64.b64decode(got["png"].partition(",")[2])))
        assert seen.size == (64, 64)
        one = (await s.http.post("/v1/explain/segment", json={**body, "against": "dog"})).json()["floats"]
        two = (await s.http.post("/v1/explain/segment", json={**body, "text": "dog", "against": "cat"})).json()[
            "floats"
        ]
        torch.testing.assert_close(torch.tensor(one), -torch.tensor(two), atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.tensor(one), want[0] - want[1], atol=1e-5, rtol=1e-4)
        few = (await s.http.post("/v1/explain/segment", json={**body, "heads": ["0.1", "2.3"]})).json()["floats"]
        want = maps.grid(lens, x, t[:1], [(0, 1), (2, 3)])[0, 0]
        torch.testing.assert_close(torch.tensor(few), want, atol=1e-5, rtol=1e-4)

    asking(work, heads)


def test_heads_are_listed_with_their_names(heads):
    async def work(s):
        got = (await s.http.get("/v1/explain/heads")).json()
        assert len(got["data"]) == 12
        name = got["data"][5]["label"]
        some = (await s.http.get(f"/v1/explain/heads?label={name}")).json()["data"]
        assert some
        assert {h["label"] for h in some} == {name}
        one = (await s.http.get("/v1/explain/heads/1.1")).json()
        assert (one["layer"], one["head"], one["trail"]) == (1, 1, [])
        assert one["texts"]

    asking(work, heads)


def test_neighbours_by_picture_text_and_property(heads, tiny_clip, fitted):
    async def work(s):
        g = load_gallery(fitted / "gallery")
        body = {"text": "cat", "heads": ["2.1"], "model": "champion", "top": 5}
        got = (await s.http.post("/v1/explain/neighbours", json=body)).json()
        rows, _ = g.nearest(clip.embed_texts(tiny_clip, ["cat"])[0], [(2, 1)], 5)
        assert [d["picture"] for d in got["data"]] == rows.tolist()
        assert got["data"][0]["png"].startswith("data:image/png")
        label = (await s.http.get("/v1/explain/heads/2.1")).json()["label"]
        body = {"image": {"data": coded(picture(2))}, "property": label, "metric": "cosine"}
        got = (await s.http.post("/v1/explain/neighbours", json=body)).json()
        assert "2.1" in got["heads"]
        assert len(got["data"]) == 8

    asking(work, heads)


def test_an_uploaded_gallery_is_sealed_grown_searched_and_deleted(heads):
    async def work(s):
        images = [{"data": coded(picture(i))} for i in range(4)]
        got = await s.http.post("/v1/explain/gallery", json={"images": [*images, {"data": "!"}]})
        first = got.json()
        assert (first["added"], first["pictures"]) == (4, 4)
        (refused,) = first["refused"]  # as every other shape tells it
        assert refused["error"].keys() == {"message", "type", "code"}
        assert refused["error"]["code"] == 400
        more = {"images": [{"data": coded(picture(4))}], "names": ["mine"], "gallery": first["gallery"]}
        second = (await s.http.post("/v1/explain/gallery", json=more)).json()
        assert second["pictures"] == 5
        body = {"image": images[2], "heads": ["1.0"], "metric": "cosine", "gallery": second["gallery"], "top": 3}
        near = (await s.http.post("/v1/explain/neighbours", json=body)).json()["data"]
        assert near[0]["name"] == "2"  # a picture of the gallery is its own nearest
        assert near[0]["score"] == pytest.approx(1.0, abs=1e-3)
        listed = (await s.http.get("/v1/explain/gallery")).json()
        assert {d["gallery"] for d in listed["data"]} == {first["gallery"], second["gallery"]}
        assert listed["sealed"]["pictures"] == 12
        gone = await s.http.delete(f"/v1/explain/gallery/{second['gallery']}")
        assert gone.json()["deleted"]
        assert (await s.http.post("/v1/explain/neighbours", json=body)).status_code == 404

    asking(work, heads)


BAD = [
    ("decompose", {"texts": [" "]}, "texts"),
    ("decompose", {"level": "patch"}, "level"),
    ("decompose", {"image": {"data": "!"}}, "base64"),
    ("decompose", {"image": {"url": "http://x"}}, "data"),
    ("segment", {"text": "a", "heads": ["9.0"]}, "no head 9.0"),
    ("segment", {"text": "a", "heads": ["0.0", "0.0"]}, "twice"),
    ("segment", {"text": "a", "heads": ["zero"]}, "heads"),
    ("segment", {"text": "a", "side": 100000}, "side"),
    ("segment", {"text": "a", "threshold": "x"}, "threshold"),
    ("neighbours", {"heads": ["0.0"], "text": "a"}, "exactly one of image and text"),
    ("neighbours", {}, "exactly one of heads and property"),
    ("neighbours", {"heads": ["7.0"]}, "no head 7.0"),
    ("neighbours", {"property": "nobody"}, "No head is called"),
    ("neighbours", {"heads": ["0.0"], "gallery": "../etc"}, "gallery"),
    ("neighbours", {"heads": ["0.0"], "gallery": "0" * 64}, "no uploaded gallery"),
    ("neighbours", {"heads": ["0.0"], "model": "base"}, "no gallery"),
    ("gallery", {"image": None, "images": []}, "images"),
    ("gallery", {"image": None, "images": [{"data": "!"}]}, "No picture could be read"),
    ("gallery", {"image": None, "images": [{"data": "!"}], "names": []}, "names"),
]


def test_what_is_wrong_is_told_why(heads):
    async def work(s):
        for path, change, says in BAD:
            body = {"image": {"data": coded(picture(0))}, **change}
            body = {k: v for k, v in body.items() if v is not None}
            got = await s.http.post(f"/v1/explain/{path}", json=body)
            assert 400 <= got.status_code < 500, (path, change, got.text)
            assert says in got.json()["error"]["message"], (path, change, got.text)
        for path, says in (
            ("heads/9.9", "0.0 to"), ("heads/x", "layer.head"), ("heads?label=zzz", "Labels"),
            ("heads?model=base", "no names"),
        ):  # fmt: skip
            got = await s.http.get(f"/v1/explain/{path}")
            assert got.status_code == 404
            assert says in got.json()["error"]["message"]
        assert (await s.http.delete("/v1/explain/gallery/..")).status_code in (404, 405)
        assert (await s.http.delete(f"/v1/explain/gallery/{'0' * 64}")).status_code == 404

    asking(work, heads)
