"""Items: what is true of them, what the scorer is given, and a bank without their own captions; for every task."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.families import clip
from registry.errors import ConfigError
from training.lab import worlds
from training.lab.company import company_classes
from training.mils import RECIPES, sounds
from training.mils.fit import TASKS
from training.mils.items import items, lines
from training.mils.scenes import pairs, scenes
from training.tasks.captions import named, objects

N = 3
KINDS = {
    "scenes": {"pixels"}, "clips": {"pixels"}, "sounds": {"sound"}, "typographic": {"pixels"}, "prompts": {"goal"},
    "styles": {"content", "style", "key"}, "plus": {"plus"}, "minus": {"plus", "minus"}, "both": {"both"},
    "company": {"pixels"},
}  # fmt: skip


def of(kind, **how):
    return replace(RECIPES["tiny"], data=kind, items=N, **how)


@pytest.fixture(scope="module")
def base():
    return clip.FAMILY.tiny(0)


def test_there_is_a_recipe_and_a_task_for_every_kind():
    assert set(KINDS) == set(TASKS)
    assert {r.data for r in RECIPES.values()} == set(KINDS)
    assert set(TASKS.values()) == {"image", "video", "audio", "prompt", "style", "arithmetic"}


@pytest.mark.parametrize("kind", KINDS)
def test_items_are_the_first_of_their_split_and_their_captions_are_right(kind, base):
    made, fewer = (items(of(kind), base, "test", n) for n in (N, N - 1))
    assert len(made.inputs) == len(made.true) == N
    assert all(set(x) == KINDS[kind] for x in made.inputs)
    if kind != "typographic":  # drawn anew for every n
        assert list(made.true[: N - 1]) == list(fewer.true)
    assert made.true != items(of(kind), base, "val", N).true
    for true in made.true:
        assert set(true) <= set(made.names)
        assert objects("a picture of a " + " and a ".join(true), true, made.names).f1 == 1.0
    for row, true in zip(made.references, made.true, strict=False):
        assert all(objects(text, true, made.names).recall == 1.0 for text in row)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("typographic", "minus", "styles")])
def test_no_line_of_the_bank_is_a_caption_of_a_test_item(kind, base):
    """Of one thing alone there must be lines (minus, styles, typographic); of two or more no line says just those."""
    for renderer in ("", "lab:diffusion") if kind == "prompts" else ("",):
        config = of(kind, renderer=renderer)
        made = items(config, base, "test", N)
        names = {"sounds": sounds.NAMES, "company": company_classes()}.get(kind, made.names)
        apart = {frozenset(true) for true in made.true if len(true) > 1 or kind == "prompts"}
        bank = lines(config)
        assert len(bank) >= (3000 if not renderer else 90)
        assert not [line for line in bank if named(line, names) in apart][:3]


def test_a_scene_shows_two_of_the_classes_and_no_pair_is_in_two_splits():
    split = {s: {frozenset(p) for p in pairs(s)} for s in ("train", "val", "test")}
    assert not split["test"] & split["val"]
    assert not split["test"] & split["train"]
    one = scenes("test", 2)
    assert torch.equal(one.images, scenes("test", 4).images[:2])
    assert {n for p in one.things for n in p} <= set(worlds.imagenet_classes())


def test_sounds_carry_what_they_are_called():
    """The nearest mean spectrum of train names val's sounds far above chance (1 of 20)."""

    def spectrum(x):
        return torch.nn.functional.normalize(torch.stft(x, 256, window=torch.hann_window(256), return_complex=True)
                                             .abs().add(1e-3).log().mean(-1), dim=-1)  # fmt: skip

    train, val = sounds.sounds("train", 200, two=False), sounds.sounds("val", 60, two=False)
    known = torch.tensor([sounds.NAMES.index(n[0]) for n in train.names])
    x = spectrum(train.samples)
    means = torch.stack([x[known == i].mean(0) for i in range(len(sounds.NAMES))])
    said = (spectrum(val.samples) @ (means - means.mean(0)).T).argmax(1).tolist()
    right = sum(sounds.NAMES[s] == n[0] for s, n in zip(said, val.names, strict=True))
    assert right / 60 > 0.4
    assert {len(n) for n in sounds.sounds("test", 20).names} == {1, 2}


def test_more_prompts_than_things_are_other_words_for_them(base):
    config = of("prompts", renderer="lab:diffusion")
    made = items(config, base, "test", 100)
    assert len(set(made.goals)) == len(made.true) == 100
    assert made.true[94:] == made.true[:6]
    with pytest.raises(ConfigError, match="188 at most"):
        items(config, base, "test", 189)
