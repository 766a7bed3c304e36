"""Silencing heads, and random ones for a control."""

from __future__ import annotations

from patches.families import clip
from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadConfig, HeadEdit
from tests.training.clip_heads.some import PLANTED, squares
from training.clip_heads.silence import random_heads


def test_silencing_the_planted_head_takes_its_text_away(planted):
    x, masks = squares()
    t = clip.embed_texts(planted, ["red"])[0]
    before = Lens(planted).read(x)
    with HeadEdit(HeadConfig(clip.SITES["heads"], (PLANTED,), 4, "zero", "cls"), {}).apply(planted.model):
        after = Lens(planted).read(x)
    red = masks.any((1, 2))
    said = before.heads.sum((1, 2)) @ t
    assert said[red].mean() > said[~red].mean() + 2
    assert after.heads.abs().max() == 0


def test_random_heads_are_others_of_the_same_layers():
    every = [(layer, h) for layer in range(3) for h in range(4)]
    mine = [(0, 1), (2, 0), (2, 3)]
    drawn = [random_heads(mine, every, seed) for seed in range(20)]
    for heads in drawn:
        assert not set(heads) & set(mine)
        assert [layer for layer, _ in heads] == [0, 2, 2]
        assert len(set(heads)) == 3
    assert len({tuple(h) for h in drawn}) > 5
