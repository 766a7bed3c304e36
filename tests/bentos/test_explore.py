"""From an edit in a request to an artifact in the store: it answers, it can be taken back, one call seals it."""

import asyncio

import pytest
import torch

from bentos.explore import varied
from bentos.runtime import EXPLORED
from patches.mechanisms.features import SAE, FeatureEdit, edit
from registry import cli
from registry.ab.ledger import Ledger
from registry.errors import PatchError
from registry.home import home
from tests.bentos.conftest import SYSTEM


def test_an_edit_is_tried_sealed_and_pushed_without_a_notebook(service, capsys):
    async def work():
        async with service() as s:

            async def make(**body):
                return await s.http.post("/v1/edits", json=body)

            got = await make(of="base", change={"neurons": [[0, 4], [2, 9]], "damp_layers": [0], "damp_limit": 0.5})
            assert got.status_code == 201, got.text
            model = got.json()["model"]
            one = await s.chat(headers={"x-patchbay-arm": model})
            assert one.headers["x-patchbay-patch"] == model.removeprefix("sha256:")
            base = await s.chat(headers={"x-patchbay-arm": "base"})
            off = await s.chat(headers={"x-patchbay-arm": model}, patchbay={"strength": 0.0})
            assert off.json()["choices"] == base.json()["choices"]
            assert (await s.chat()).headers["x-patchbay-patch"] == s.digests[0]  # nobody gets it who does not name it
            assert not (home() / "runs").exists()
            again = await make(of=model, change={"damp_limit": 0.5}, keep=True)
            assert again.status_code == 201  # its parent is part of what it is
            kept = again.json()
            assert (home() / "runs" / kept["sealed"] / "manifest.json").is_file()
            for i in range(EXPLORED):
                assert (await make(of="champion", change={"neurons": [[1, i]]})).status_code == 201
            assert len(s.runtime.explored) == EXPLORED
            await asyncio.sleep(0.7)
            assert (await s.chat(headers={"x-patchbay-arm": model})).status_code == 404
            return kept

    kept = asyncio.run(work())
    program, *words = kept["next"].split()
    assert program == "patchbay"
    assert cli.main(words) == 0  # as it stands, wherever the home is
    assert Ledger().head(SYSTEM).challenger == kept["digest"]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"change": {}}, "change"),
        ({"change": {"colour": 1}}, "colour"),
        ({"change": {"neurons": "all"}}, "neurons"),
        ({"change": {"neurons": [[99, 1]]}}, "99"),
        ({"of": "nobody", "change": {"neurons": [[0, 1]]}}, "nobody"),
        ({"change": {"neurons": [[0, 1]]}, "folder": "/etc"}, "folder"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_and_the_service_goes_on(service, body, says):
    async def work():
        async with service() as s:
            got = await s.http.post("/v1/edits", json=body)
            assert 400 <= got.status_code < 500, got.text
            assert says in got.text
            assert not s.runtime.explored
            assert (await s.chat()).status_code == 200

    asyncio.run(work())


def test_some_features_of_an_edit_are_the_edit_of_those_features():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(9, 4, generator=g)
    for activation, k in (("relu", 0), ("topk", 3)):
        sae = SAE(w, torch.zeros(9), w, torch.zeros(4), activation, k, None)
        whole = edit(sae, "visual", [2, 5, 7], "scale", torch.tensor([0.1, 0.2, 0.3]))
        some, want = varied(FeatureEdit, whole, {"features": [7, 2]}), edit(sae, "visual", [7, 2], "scale", 0.0)
        want = FeatureEdit(want.config, {**want.tensors, "value": torch.tensor([0.3, 0.1])})
        assert some.config == want.config
        assert all(torch.equal(some.tensors[name], t) for name, t in want.tensors.items())
        with pytest.raises(PatchError, match="no feature 4"):
            varied(FeatureEdit, whole, {"features": [4]})
