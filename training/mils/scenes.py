"""What MILS is measured on: scenes of two things, and what is true of them; clips of one thing that moves.

A scene shows two of the lab's 100 classes on one of nine grounds, in styles that split by split differ. Pairs of test
are kept out of the bank. Every function is one of (split, n, seed); the first n scenes are the same for every n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from training.lab import atlas, worlds
from training.lab.renderer import GROUNDS, Layout, choose, generator, grounds, render, take, things

MOST = 400
"""scenes a split has"""
_TEXTURES = {"train": (0, 24), "val": (24, 28), "test": (28, 32)}


@dataclass(frozen=True)
class Scenes:
    """n pictures and what is in them."""

    images: Tensor
    """(n, 3, 96, 96) uint8"""
    things: tuple[tuple[str, ...], ...]
    grounds: tuple[str, ...]

    @property
    def references(self) -> list[list[str]]:
        """Both orders of every scene's caption."""
        return [
            [f"a picture of a {' and a '.join(order)} on {g}" for order in (t, t[::-1])]
            for t, g in zip(self.things, self.grounds, strict=True)
        ]


@cache
def pairs(split: str, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """The things of a split's scenes: no pair of test is one of the other splits."""
    classes = worlds.imagenet_classes()
    g = generator("mils/pairs", seed)
    order = [(a, b) for a in range(len(classes)) for b in range(a)]
    shuffled = torch.randperm(len(order), generator=g).tolist()
    at = {"test": 0, "val": MOST, "train": 2 * MOST}[split]
    return tuple((classes[order[i][0]], classes[order[i][1]]) for i in shuffled[at : at + MOST])


def scenes(split: str, n: int, seed: int = 0) -> Scenes:
    """The first n scenes of a split."""
    lab, g = atlas.load(), generator("mils/scenes", split, seed)
    both = pairs(split, seed)
    sprite = torch.stack(
        [torch.stack([choose(lab.pick([lab.find(name)], worlds.STYLES[split]), (1,), g)[0] for name in pair])
         for pair in both]
    )  # fmt: skip
    layout = Layout(grounds(MOST, g, textures=_TEXTURES[split]), things(sprite, g))
    few = render(take(layout, torch.arange(n)))
    where = tuple(GROUNDS[k] for k in few.ground.tolist())
    return Scenes(few.image, both[:n], where)


def clips(
    split: str, n: int, frames: int = 6, seed: int = 0
) -> tuple[Tensor, tuple[tuple[str, str], ...], tuple[str, ...]]:
    """n clips (n, T, 3, 96, 96) uint8 whose first thing drifts through the first half of the frames and whose second
    one through the other half, so that no frame shows both; what they are; the grounds."""
    lab, g = atlas.load(), generator("mils/clips", split, seed)
    both = pairs(split, seed)
    sprite = torch.stack(
        [torch.stack([choose(lab.pick([lab.find(name)], worlds.STYLES[split]), (1,), g)[0] for name in pair])
         for pair in both]
    )  # fmt: skip
    ground = grounds(MOST, g, textures=_TEXTURES[split])
    thing = things(sprite, g, size=(0.45, 0.7))
    drift = (torch.rand(MOST, 2, generator=g) - 0.5) * 0.6
    seen = []
    for f in range(frames):
        which = 0 if f < frames // 2 else 1
        at = (f % (frames // 2)) / max(1, frames // 2 - 1) - 0.5
        part = {k: v[:n, which : which + 1] for k, v in vars(thing).items()}
        part["centre"] = (0.3 * part["centre"] + at * drift[:n, None]).clamp(-0.6, 0.6)
        few = take(Layout(ground, thing), torch.arange(n)).grounds
        seen.append(render(Layout(few, replace(thing, **part))).image)
    where = tuple(GROUNDS[k] for k in ground.kind[:n].tolist())
    return torch.stack(seen, 1), both[:n], where
