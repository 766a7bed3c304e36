"""Scenes with controlled object co-occurrence, on which a captioner's hallucinations can be told from its other errors.

    worlds.coco("test", 600, kind="alone")      # one member of a co-occurring pair without its partner
    worlds.coco("test", 600, kind="neutral")    # objects of no pair: the control

A captioner trained on biased scenes learns that the two objects of a pair occur together. Naming the absent partner on
`alone` and not on `neutral` is a hallucination that it learned from co-occurrence. Each scene has one to four objects,
each in its own quarter of 192 px, which a 96 px vision tower reads on its own. Shapes: B images, K objects.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Generator, Tensor

from registry.errors import Invalid
from training.data.images import Dataset
from training.lab import atlas
from training.lab.renderer import SIZE, Layout, grounds, things, uniform
from training.lab.worlds import (
    _TEXTURES,
    PAIRS,
    SEEN,
    Split,
    _dataset,
    _sprites,
    _start,
    coco_classes,
    imagenet_classes,
)

COMPANY = ("biased", "alone", "pair", "neutral", "loose", "full")
"""Kinds of scenes. biased: the first object of a pair in 70 % of the scenes, usually with its partner; alone: the first
without its partner; pair: both; neutral: the first object of no pair; loose: objects drawn independently; full: as
loose, with one object in every quarter"""
CAPTIONED: dict[str, tuple[str, ...]] = {
    "train": tuple(s for s in SEEN if s != "twemoji"),
    "val": tuple(s for s in SEEN if s != "twemoji"),
    "test": ("twemoji",),
    "held": (atlas.HELD,),
}
"""Sprite styles of each split. Only twemoji is unseen by captioners, because the other sets lack some of the classes;
val differs from train by seed and by background textures, not by style"""


def company(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    kind: str = "alone",
    correlation: float = 0.9,
    size: int = 2 * SIZE,
    device: str = "cpu",
) -> Dataset:
    """Build the captioners' version of `worlds.coco`: one to four objects with the co-occurrence `kind` (see COMPANY).

    Hallucinations on `alone` that do not occur on `neutral` were learned from co-occurrence. The first object of a pair
    occurs only as `kind` says; some other pair's partner occurs without its first in a quarter of the scenes. label:
    index of the pair whose first object is shown, -1 if none. Extras: `things` (B, 3 or 4) index in
    `company_classes()`, -1 for none; `objects` (B, 80) bool over these classes; `partner` (B,) class index of the
    pair's partner, -1 without a first; and those of `worlds._extras`. Raises Invalid for an unknown kind.
    """
    if kind not in COMPANY:
        raise Invalid(f"kind={kind!r:.40} must be one of {', '.join(COMPANY)}.")
    lab, classes = atlas.load(), company_classes()
    g = company_start(split, n, seed, kind)
    what, head = company_things(n, kind, correlation, g)
    kinds = [[lab.find(c)] for c in classes]
    sprite = torch.stack([_sprites(column.clamp(min=0), kinds, CAPTIONED[split], g) for column in what.unbind(1)], 1)
    stuff = things(torch.where(what >= 0, sprite, -1), g)
    stuff = replace(stuff, size=uniform(tuple(what.shape), 0.35, 0.42, g))
    layout = Layout(grounds(n, g, textures=_TEXTURES[split]), stuff)
    objects = torch.zeros(n, len(classes) + 1, dtype=torch.bool)
    objects = objects.scatter_(1, torch.where(what >= 0, what, len(classes)), True)[:, :-1]
    partner = torch.where(head >= 0, head + len(PAIRS), -1)
    extras = {"things": what, "objects": objects, "partner": partner}
    about = {"seed": seed, "kind": kind, "correlation": correlation, "size": size}
    return _dataset("coco", split, classes, layout, head, extras, about, device, size=size)


@cache
def company_classes() -> tuple[str, ...]:
    """Return the 80 class names: the pairs' first objects, their partners, and 32 neutral objects in every style."""
    free = [n for n in imagenet_classes() if n not in coco_classes() and not n.endswith(" face")]
    return coco_classes() + tuple(free[:: max(1, len(free) // 32)][:32])


def company_start(split: Split, n: int, seed: int, kind: str) -> Generator:
    """Return the seeded generator of `company`; `company_things` draws from it first and alone repeats the objects."""
    return _start(f"company/{kind}", split, n, seed)


def company_things(n: int, kind: str, correlation: float, g: Generator) -> tuple[Tensor, Tensor]:
    """Draw the objects of n scenes with the co-occurrence `kind`.

    Returns their class indices (n, 3), or (n, 4) if `full`, -1 for none; and the pair whose first object is shown (n,),
    -1 if none.
    """
    pairs, classes = len(PAIRS), len(company_classes())
    count = 1 + torch.multinomial(torch.tensor([0.15, 0.6, 0.25]), n, replacement=True, generator=g)
    if kind in ("loose", "full"):
        out = torch.rand(n, classes, generator=g).argsort(1)[:, : 4 if kind == "full" else 3]
        out = out if kind == "full" else out.masked_fill(torch.arange(3) >= count[:, None], -1)
        return out, torch.full((n,), -1)
    head = torch.randint(pairs, (n,), generator=g)
    if kind == "biased":
        first = torch.rand(n, generator=g) < 0.7
        both = first & (torch.rand(n, generator=g) < correlation)
    else:
        first, both = torch.full((n,), kind != "neutral"), torch.full((n,), kind == "pair")
        count = 2 + (torch.rand(n, generator=g) < 0.2).long()
    others = 2 * pairs + torch.rand(n, classes - 2 * pairs, generator=g).argsort(1)[:, :3]
    stray = pairs + (head + torch.randint(1, pairs, (n,), generator=g)) % pairs  # a partner without its first
    others[:, 0] = torch.where(torch.rand(n, generator=g) < 0.25, stray, others[:, 0])
    cast = torch.cat([torch.where(first, head, -1)[:, None], torch.where(both, head + pairs, -1)[:, None], others], 1)
    there = (cast < 0).long().argsort(dim=1, stable=True)  # stable sort: objects first, empty places (-1) last
    count = torch.maximum(count, first.long() + both.long())
    out = cast.gather(1, there)[:, :3].masked_fill(torch.arange(3) >= count[:, None], -1)
    return out, torch.where(first, head, -1)
