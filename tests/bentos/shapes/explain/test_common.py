"""What the shapes that explain share: one field and one guard for base beside patched, one read of what is sealed."""

from __future__ import annotations

import asyncio

import pytest
import torch

from bentos.shapes.explain import common, features, heads, neurons
from registry.ab.ledger import BASE
from registry.errors import NotFound
from tests.bentos.shapes.test_classify import coded, picture

CALLS = [call for module in (features, heads, neurons) for call in module.ROUTES if call.body is not None]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.handler.__qualname__ + c.path)
def test_base_beside_patched_has_one_name(call):
    assert issubclass(call.body, common.Read), "what all questions may say is said once"
    both = {"compare", "patched", "both", "sides"} & set(call.body.model_fields)
    assert both <= {"compare"}
    assert ("compare" in both) == issubclass(call.body, common.Compared), "only there is the scope looked at"


def test_both_sides_of_heads_are_told_to_the_scope_compare_alone(heads, tokens):
    known = tokens(one={"name": "one", "scopes": ["explain"]}, both={"name": "both", "scopes": ["explain", "compare"]})
    image = {"data": coded(picture(1))}
    asks = {
        "decompose": {"image": image, "texts": ["cat"]},
        "segment": {"image": image, "text": "cat", "side": 16},
    }

    async def work():
        async with heads(tokens=known) as s:
            for path, ask in asks.items():

                async def post(token, **more):
                    head = {"authorization": f"Bearer {token}"}
                    return await s.http.post(f"/v1/explain/{path}", json={**ask, **more}, headers=head)  # noqa: B023

                assert (await post("one", compare=True)).status_code == 403
                assert (await post("one", model="champion")).status_code == 200
                alone = (await post("both", model="base")).json()
                got = (await post("both", model="champion", compare=True)).json()
                field = "heads" if path == "decompose" else "floats"
                assert got["base"][field] == alone[field], "the base beside a patch is the base alone"
                assert not torch.equal(torch.tensor(got[field]), torch.tensor(alone[field]))
                assert "base" not in (await post("both", model="base", compare=True)).json()

    asyncio.run(work())


def test_what_is_sealed_is_read_once_and_forgotten_oldest_first():
    read = []

    def load(digest):
        read.append(digest)
        return digest.upper()

    async def work():
        sealed = common.Sealed(load, 2, "cards")
        assert await asyncio.gather(*(sealed.of("a") for _ in range(5))) == ["A"] * 5
        assert read == ["a"]
        for digest in ("b", "a", "c", "a", "b"):
            await sealed.of(digest)
        assert read == ["a", "b", "c", "b"]
        sealed.forget("b")
        await sealed.of("b")
        assert read[-2:] == ["b", "b"]
        with pytest.raises(NotFound, match="The base has no cards"):
            await sealed.of(BASE)

    asyncio.run(work())
