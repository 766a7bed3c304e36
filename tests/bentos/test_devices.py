"""A service answers the same wherever its model lies; here on a device that is none (tests/far.py)."""

import asyncio

import pytest

from tests.bentos.shapes.test_classify import coded, picture
from tests.far import FAR

ONE = {"data": coded(picture(0))}
BOTH = {"images": [ONE, {"data": coded(picture(1))}]}
WORDS = ["cat", "dog", "sun"]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0, "logprobs": True}
ASKED = {
    "service": [
        ("chat/completions", {"model": "base", **CHAT}),
        ("chat/completions", {"model": "champion", **CHAT}),
    ],
    "pictures": [
        ("classify", {**BOTH, "labels": WORDS, "patchbay": {"compare": True}}),
        ("explain/encode", {"image": ONE, "top": 5, "maps": True}),
        ("explain/steer", {"image": ONE, "features": [0, 3], "labels": WORDS, "op": "zero", "strengths": [0.0, 1.0]}),
    ],
    "neurons": [
        ("explain/attributes", {**BOTH, "model": "champion", "top": 3, "compare": True}),
        ("explain/segment", {"image": ONE, "text": "cat", "against": "dog"}),
        ("explain/mine", {"true": "cat", "wrong": "dog"}),
    ],
    "heads": [
        ("explain/decompose", {"image": ONE, "texts": WORDS, "compare": True, "vectors": True}),
        ("explain/segment", {"image": ONE, "text": "cat", "format": ["floats", "rle", "png"]}),
        ("explain/neighbours", {"image": ONE, "heads": ["0.1"]}),
    ],
}


@pytest.mark.parametrize("shape", ASKED)
def test_the_answers_are_those_of_the_cpu(far, request, shape):
    service = request.getfixturevalue(shape)

    async def answers(device):
        async with service(device=device) as s:
            got = []
            for path, body in ASKED[shape]:
                response = await s.http.post(f"/v1/{path}", json=body)
                assert response.status_code == 200, (device, path, response.text)
                got.append(response.json())
            assert s.runtime.base.device.type == device
            return got

    there, here = (asyncio.run(answers(device)) for device in (FAR, "cpu"))
    for (path, _), a, b in zip(ASKED[shape], there, here, strict=True):
        assert near(a, b), path


def near(a, b):
    """Equal up to rounding, whatever is in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[k], b[k]) for k in a if k not in ("id", "created"))
    if isinstance(a, list):
        return len(a) == len(b) and all(near(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else isinstance(a, type(b))
