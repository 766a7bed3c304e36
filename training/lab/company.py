"""`worlds.coco` for captioners: scenes whose company is controlled, so that what a captioner invents can be told apart.

    worlds.coco("test", 600, kind="alone")      # the first of a pair without its partner: here company is invented
    worlds.coco("test", 600, kind="neutral")    # no first of any pair: here it is not

One to three things, each in its own quarter of 192 px, where a 96 px tower reads it. Shapes: B pictures, K things.
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
"""what `company` draws: biased, the first of a pair in 70 % of the scenes and its partner with it in most of these;
alone, the first without its partner; pair, both; neutral, no first of any pair; loose, anything with anything; full, as
loose with one thing in every quarter"""
CAPTIONED: dict[str, tuple[str, ...]] = {
    "train": tuple(s for s in SEEN if s != "twemoji"),
    "val": tuple(s for s in SEEN if s != "twemoji"),
    "test": ("twemoji",),
    "held": (atlas.HELD,),
}
"""styles of `company`: twemoji alone is unseen by a captioner, since other sets miss some of its classes; val differs
from train by seed and by the textures of the ground, not by style"""


def company(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    kind: str = "alone",
    correlation: float = 0.9,
    size: int = 2 * SIZE,
    device: str = "cpu",
) -> Dataset:
    """`coco` for captioners: one to three things, each in its own quarter, in controlled company (`kind`: COMPANY).

    What a captioner invents on `alone` and not on `neutral` it learned from company. A pair's first never comes but by
    `kind`, its partner comes without it in a quarter of the scenes. label: the pair whose first is there, -1 none.
    Extras: `things` (B, 3 or 4) index of `company_classes()`, -1 nothing; `objects` (B, 80) bool over them; `partner`
    (B,) index of the pair's partner, -1 without a first; and those of `_extras`. Raises Invalid for another kind.
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
    """80 names: the pairs' first things, their partners, and 32 neutral ones that every style drew."""
    free = [n for n in imagenet_classes() if n not in coco_classes() and not n.endswith(" face")]
    return coco_classes() + tuple(free[:: max(1, len(free) // 32)][:32])


def company_start(split: Split, n: int, seed: int, kind: str) -> Generator:
    """What `company` draws from; its first draws are `company_things`."""
    return _start(f"company/{kind}", split, n, seed)


def company_things(n: int, kind: str, correlation: float, g: Generator) -> tuple[Tensor, Tensor]:
    """(n, 3) things of `company_classes()` (4 if `full`), -1 nothing; (n,) the pair whose first is there, -1 none."""
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
    there = (cast < 0).long().argsort(dim=1, stable=True)  # those that are there come first
    count = torch.maximum(count, first.long() + both.long())
    out = cast.gather(1, there)[:, :3].masked_fill(torch.arange(3) >= count[:, None], -1)
    return out, torch.where(first, head, -1)
