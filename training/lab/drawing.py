"""How worlds are drawn: styles and grounds of a split, sprites, layouts, motion, what a picture is known to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from registry.errors import Invalid, NotFound
from training.data.images import Batch, Dataset
from training.lab import atlas
from training.lab.renderer import (
    SIZE,
    VERSION,
    Layout,
    Scene,
    Things,
    generator,
    render,
    take,
    things,
    uniform,
)

Split = Literal["train", "val", "test", "held"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "held")
STYLES: dict[str, tuple[str, ...]] = {
    "train": ("noto", "fluent-emoji", "fluent-emoji-flat"),
    "val": ("openmoji",),
    "test": ("twemoji", "emojione", "emojione-v1"),
    "held": (atlas.HELD,),
}
"""for worlds whose classes are the same in every split; the two Fluents are of one hand, so they stay together"""
SEEN = tuple(s for s in atlas.STYLES if s != atlas.HELD)
HANDS: dict[str, tuple[str, ...]] = {
    "noto": ("noto",),
    "fluent-emoji": ("fluent-emoji", "fluent-emoji-flat"),
    "openmoji": ("openmoji",),
}
"""whose styles train and val have. A fold leaves one hand out: its `val` is drawn by that hand alone, on grounds that
its `train`, drawn by the others, has not; `test` is in none"""
MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink", "spin left", "spin right", "swing", "bounce")
FOLDED = {"train": (0, 16), "val": (16, 28)}
TEXTURES = {"train": (0, 24), "val": (24, 28), "test": (28, 32), "held": (28, 32)}


# ---- their parts --------------------------------------------------------------------------------------------------


def seeded(name: str, split: str, n: int, seed: int) -> Generator:
    if split not in SPLITS:
        raise Invalid(f"split={split!r:.40} must be one of {', '.join(SPLITS)}.")
    if not 1 <= n <= 10_000_000:
        raise Invalid(f"n={n} must be between 1 and 10 million.")
    return generator(name, split, n, seed)


def drawn_from(split: str, fold: str) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Styles and textures of a split. Raises NotFound for another fold, or for a split that is in none."""
    if not fold:
        return STYLES[split], TEXTURES[split]
    if fold not in HANDS or split not in FOLDED:
        raise NotFound(f"fold={fold!r:.40} of {split}: folds are {', '.join(HANDS)}, of {' and '.join(FOLDED)}.")
    every = STYLES["train"] + STYLES["val"]
    return HANDS[fold] if split == "val" else tuple(s for s in every if s not in HANDS[fold]), FOLDED[split]


def shuffled(x: Tensor, g: Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=g)]


def so_many(n: int, share: float) -> Tensor:
    """(n,) bool of which as many as can be are true, evenly spread."""
    edge = (torch.arange(n + 1, dtype=torch.float64) * share + 1e-9).floor()
    return edge[1:] > edge[:-1]


def two_labels(n: int, shares: tuple[float, float], g: Generator, signed: bool = True) -> tuple[Tensor, Tensor]:
    """(n,) label and (n,) place, 0 or 1, both classes as large. shares: of label 0 and of 1, how many have place 1;
    signed: how many have the place of their label."""
    label = torch.arange(n) % 2
    place = torch.empty(n, dtype=torch.int64)
    for y in (0, 1):
        share = so_many(len(label[y::2]), shares[y]).long()
        place[y::2] = 1 - share if signed and y == 0 else share
    order = torch.randperm(n, generator=g)
    return label[order], place[order]


def pick_sprites(
    label: Tensor, kinds: Sequence[Sequence[int]], styles: Sequence[str], g: Generator, tones: bool = False
) -> Tensor:
    """(n,) a sprite for each label: first a concept of its kind that these styles drew, then one of its sprites."""
    table, wide, deep = sprite_pools(tuple(map(tuple, kinds)), tuple(styles), tones)
    which = (torch.rand(len(label), generator=g) * wide[label]).long()
    one = (torch.rand(len(label), generator=g) * deep[label, which]).long()
    return table[label, which, one]


@lru_cache(64)
def sprite_pools(
    kinds: tuple[tuple[int, ...], ...], styles: tuple[str, ...], tones: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(kinds, widest, deepest) sprites by kind and concept, repeated to be full; (kinds,) concepts of each kind;
    (kinds, widest) sprites of each concept."""
    lab = atlas.load()
    pools: list[list[Tensor]] = []
    for concepts in kinds:
        drawn = [p for c in concepts if len(p := lab.pick([c], styles, tones))]
        if not drawn:
            who = ", ".join(lab.names[c] for c in concepts[:4]) or "the class"
            raise NotFound(f"Nobody drew {who} in {', '.join(styles)}; take another split or attribute.")
        pools.append(drawn)
    widest = max(len(p) for p in pools)
    deepest = max(len(s) for p in pools for s in p)
    table = torch.stack([torch.stack([p[i % len(p)].repeat(deepest)[:deepest] for i in range(widest)]) for p in pools])
    wide = torch.tensor([len(p) for p in pools])
    deep = torch.tensor([[len(p[i % len(p)]) for i in range(widest)] for p in pools])
    return table, wide, deep


@lru_cache(16)
def told_apart(names: tuple[str, ...]) -> Tensor:
    """(C, C) float32: 1 where two names share no word."""
    words = [set(n.split()) for n in names]
    return torch.tensor([[not a & b for b in words] for a in words]).float()


def large_thing(sprite: Tensor, g: Generator) -> Things:
    """One thing in the middle, upright, its own colours: how a zero-shot benchmark shows it."""
    return things(sprite, g, size=(0.75, 0.95), centred=True, turn=0.0, tint=0.0)


@cache
def portraits() -> dict[int, tuple[bool, ...]]:
    """concept of the people without a role -> ATTRIBUTES."""
    lab, out = atlas.load(), {}
    for c, (name, subgroup) in enumerate(zip(lab.names, lab.subgroups, strict=True)):
        who = atlas.person(name)
        if subgroup == "person" and who and who.gender and who.age in ("", "old"):
            hair = tuple(who.hair == h for h in ("blond", "red", "white", "curly", "bald"))
            out[c] = (who.gender == "man", *hair, who.beard, who.age == "old")
    return out


def each_frame(part: Any, frames: int) -> Any:
    return type(part)(**{k: v.repeat_interleave(frames, 0) for k, v in vars(part).items()})


def moved_things(thing: Things, label: Tensor, frames: int, g: Generator) -> Things:
    """The things of n * frames pictures, each moved as its clip's label says."""
    n = len(label)
    t = torch.linspace(0, 1, frames).repeat(n)
    move = label.repeat_interleave(frames)
    speed = uniform((n,), 0.7, 1.0, g).repeat_interleave(frames)
    phase = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0).repeat_interleave(frames)
    is_ = {name: (move == i).float() for i, name in enumerate(MOTIONS)}
    x, y = thing.centre[:, 0].unbind(-1)
    way = (2 * t - 1) * 0.55 * speed
    sideways, upright = is_["left"] + is_["right"], is_["up"] + is_["down"]
    swing, bounce = is_["swing"], is_["bounce"]
    x = x * 0.5 * (1 - sideways - swing) + (is_["right"] - is_["left"]) * way
    x = x + swing * phase * 0.5 * speed * torch.sin(2 * math.tau * t)
    y = y * 0.5 * (1 - upright - bounce) + (is_["down"] - is_["up"]) * way
    y = y + bounce * (0.45 - 0.9 * speed * torch.sin(2 * math.pi * t).abs())
    grown = 1 + 0.9 * speed * t
    size = thing.size[:, 0] * (1 + is_["grow"] * (grown - 1)) * (1 + is_["shrink"] * (1.9 / grown - 1))
    turn = thing.turn[:, 0] + (is_["spin right"] - is_["spin left"]) * 1.5 * math.pi * speed * t
    return replace(thing, centre=torch.stack([x, y], -1)[:, None], size=size[:, None], turn=turn[:, None])


def extras_of(scene: Scene) -> dict[str, Any]:
    """What every world tells: `concept`, `style`, `box` and `mask` of the first thing, `ground`, `word`, `letters` and
    `strip` (B, R, R) bool, `word_box`; with several things also `concepts`, `boxes` and `masks` (B, K, ...) of all."""
    many = {"concepts": scene.concept, "boxes": scene.box, "masks": scene.mask} if scene.concept.shape[1] > 1 else {}
    return {
        **many,
        "concept": scene.concept[:, 0],
        "style": scene.style[:, 0],
        "box": scene.box[:, 0],
        "mask": scene.mask[:, 0],
        "ground": scene.ground,
        "word": scene.words,
        "letters": scene.letters,
        "strip": scene.strip,
        "word_box": scene.word_box,
    }


def dataset_of(
    name: str,
    split: str,
    classes: tuple[str, ...],
    layout: Layout,
    label: Tensor,
    own: dict[str, Tensor],
    about: dict[str, Any],
    device: str,
    frames: int = 0,
    size: int = SIZE,
) -> Dataset:
    def read(rows: Tensor) -> Batch:
        pictures = (rows[:, None] * frames + torch.arange(frames)).flatten() if frames else rows
        scene = render(take(layout, pictures), device, size)
        image, extras = scene.image, extras_of(scene)
        if frames:
            clip = len(rows), frames
            image = image.view(*clip, *image.shape[1:])
            extras = {
                k: (v := extras[k]).view(*clip, *v.shape[1:]) for k in ("concept", "style", "box", "mask", "ground")
            }
        return Batch(image, label[rows].to(device), {**extras, **{k: v[rows].to(device) for k, v in own.items()}})

    about = {**about, "atlas": atlas.load().digest, "renderer": VERSION}
    return Dataset(f"lab:{name}", split, classes, len(label), about, read)
