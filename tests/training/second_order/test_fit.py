"""What a fit sees and seals; candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from patches import artifact
from patches.evidence import read_evidence
from patches.evidence.neuron_cards import (
    load_neurons,
)
from patches.families.clip.second_order import lens
from patches.mechanisms.neurons import NeuronEdit
from tests.training.second_order.some import LAYER, TINY
from training.lab import worlds
from training.second_order import fit
from training.second_order.fit import candidates


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The tiny recipe, fitted with every split but train and val out of reach; its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as m:
        for name, world in worlds.WORLDS.items():

            def guarded(split, *args, world=world, **more):
                assert split in ("train", "val"), "fitting must not see this split"
                return world(split, *args, **more)

            m.setitem(worlds.WORLDS, name, guarded)
        fit(TINY, folder)
    return folder


def test_a_fit_sees_train_and_val_alone_and_seals_its_evidence(fitted):
    _, patch = artifact.load(fitted)
    assert isinstance(patch, NeuronEdit)
    report = read_evidence(fitted)
    rows = report["candidates"]
    assert report["chosen"]["worth"] == max(r["worth"] for r in rows)
    assert len(patch.config.neurons) == report["chosen"]["count"] == len(report["random"]["neurons"])
    assert not set(patch.config.neurons) & set(report["random"]["neurons"])
    assert {(r["layer"], r["edit"], r["count"]) for r in rows} == {
        (layer, e, n) for layer in (0, 1) for e in ("effects", "activations") for n in (4, 32)
    }
    cards = load_neurons(fitted)
    assert set(cards.layers) == {0, 1}
    for layer in ("0", "1"):
        asked = report["questions"]["layers"][layer]
        assert sum(asked["explained"]["histogram"]) == 128
        for kind in ("heavy", "random"):
            steps = asked["paths"][kind]["steps"]
            assert set(steps) == {"norms", "patterns", "hops", "mlps", "direct"}
            assert steps["direct"]["energy"] == pytest.approx(1.0)
        shares = report["questions"]["ablations"]["layers"][layer]
        assert 0 < shares["counts_share"] < 1


def test_no_candidate_leaves_too_few_neurons_for_its_control(planted):
    lenses = {LAYER: lens(planted, LAYER)}
    half = lenses[LAYER].neurons // 2
    tried = candidates(replace(TINY, counts=(4, half, half + 1)), lenses)
    assert {n for _, _, n in tried} == {4, half}
    assert {n for _, _, n in candidates(replace(TINY, counts=(half + 1,)), lenses)} == {half}
