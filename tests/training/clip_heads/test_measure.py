"""Who carries an answer; the questions of each property."""

from __future__ import annotations

import pytest
import torch

from patches.families import clip
from patches.families.clip.direct import Lens
from tests.training.clip_heads.some import PLANTED
from training.clip_heads.measure import carriers
from training.lab.probes import PROBES, Probe


def test_the_planted_head_carries_the_answer_and_nothing_else_does(planted):
    """Reds of any shade against blues: what tells them apart in the embedding is head 2.1."""
    words = clip.embed_texts(planted, ["red", "blue"])
    image = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    image[:, 0] = torch.arange(150, 246, 12)[:, None, None]
    got = carriers(Lens(planted), Probe(image, words.T, torch.zeros(8, dtype=torch.long)))
    assert got["heads"] + got["mlps"] + got["constants"] == pytest.approx(1, abs=1e-3)
    assert tuple(got["best"][0][:2]) == PLANTED
    assert got["best"][0][2] == pytest.approx(got["heads"], abs=1e-3)


@pytest.mark.parametrize("name", PROBES)
def test_probes_ask_what_the_base_knows_nothing_of_by_chance(tiny_clip, name):
    probe = PROBES[name](tiny_clip, "test", 12, 0)
    assert len(probe.image) == len(probe.right) == 12
    assert int(probe.right.max()) < probe.answers.shape[1]
    assert probe.open is None or probe.open[torch.arange(12), probe.right].all()
    assert 0 <= probe.accuracy(tiny_clip) <= 1
