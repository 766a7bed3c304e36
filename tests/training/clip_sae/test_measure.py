"""How many features steer, beside neurons and directions drawn at random."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.training.clip_sae.some import TINY, some_sae
from training.clip_sae.measure import steerable
from training.clip_sae.streams import streams
from training.lab import atlas
from training.tasks.recognition import pictures


@pytest.mark.parametrize("layer", [0, 2])
def test_as_many_neurons_and_random_directions_as_features_are_held_against_each_other(tiny_clip, layer):
    config = replace(TINY, layers=(layer,), steer_features=20, steer_strengths=(0.0, 2.0))
    stream = streams(tiny_clip, config, pictures(config, "val", 24)["clean"])[layer]
    got = steerable(tiny_clip, config, layer, some_sae(), stream)
    assert list(got) == ["features", "neurons", "random"]
    for kind in got.values():
        assert kind["2"]["power"] > kind["0"]["power"] >= 0
        for side in kind.values():
            assert side["features"] == 20
            assert side["coverage"] <= side["steerable"] <= 20
            assert side["words"] == len(atlas.load().names)
            assert side["pictures"] == 16
