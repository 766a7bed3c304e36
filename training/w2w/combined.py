"""Edits that come late, and several at once: what delayed injection keeps, and whether edits add up."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Generator, Tensor

from registry.measure import Measure
from training.lab.faces import BINARY
from training.w2w.draw import read
from training.w2w.measure import EXCLUDES, Lab, compare, edited, over_people, summary


def reversing(lab: Lab, name: str, strength: float, random: Generator | None = None) -> Tensor:
    """(n, d) people's adapters with one attribute reversed, or as far along a random direction each."""
    i = BINARY.index(name)
    sign = 1 - 2 * (lab.labels[:, i] > 0.5).float()
    return edited(lab.space, lab.theta, lab.space.config.attributes.index(name), sign, strength, random)


def delayed(lab: Lab, strength: float, levels: Sequence[int], pictures: int = 2) -> dict[str, dict[str, Measure]]:
    """Flips and side effects when the edit is injected at each of `levels`: above it a row is the unedited person."""
    before = lab.draw(lab.theta, pictures, 11)
    p0 = read(lab.judge, before, pictures)
    out = {}
    for level in levels:
        moved = []
        for name in (n for n in BINARY if n in lab.space.config.attributes):
            image = lab.draw(reversing(lab, name, strength), pictures, 11, early=lab.theta, after=level)
            moved.append(compare(lab, BINARY.index(name), before, p0, image))
        out[f"after {level}"] = summary(moved)
    return out


def composed(lab: Lab, strength: float, pictures: int = 2) -> dict[str, Measure]:
    """Two attributes reversed at once, over all pairs that do not exclude each other by meaning.

    both: share of pictures that showed both as they are and show both reversed now; alone: the product of the two
    shares when each is reversed by itself; random: both, along two random directions of the same norms.
    """
    before = lab.draw(lab.theta, pictures, 11)
    was = (read(lab.judge, before, pictures) > 0.5) == (lab.labels[:, None] > 0.5)
    names = [n for n in BINARY if n in lab.space.config.attributes]
    g = Generator().manual_seed(4)
    steps = {n: reversing(lab, n, strength) - lab.theta for n in names}
    turned = {n: _turned(lab, lab.theta + step, pictures) for n, step in steps.items()}
    rows: dict[str, list[Tensor]] = {"both": [], "alone": [], "random": []}
    for a, b in combinations(names, 2):
        i, j = BINARY.index(a), BINARY.index(b)
        if j in EXCLUDES.get(i, ()):
            continue
        asked = was[..., i] & was[..., j]
        chance = lab.theta + sum(reversing(lab, n, strength, g) - lab.theta for n in (a, b))
        together = _turned(lab, lab.theta + steps[a] + steps[b], pictures)
        rows["both"].append(_share(together[..., i] & together[..., j], asked))
        rows["alone"].append(_share(turned[a][..., i], asked) * _share(turned[b][..., j], asked))
        said = _turned(lab, chance, pictures)
        rows["random"].append(_share(said[..., i] & said[..., j], asked))
    return {k: over_people(torch.stack(v).nanmean(0)) for k, v in rows.items()} if rows["both"] else {}


def _turned(lab: Lab, theta: Tensor, pictures: int) -> Tensor:
    """(n, pictures, 9) whether the judge reads the opposite of what is true of the person."""
    return (read(lab.judge, lab.draw(theta, pictures, 11), pictures) > 0.5) != (lab.labels[:, None] > 0.5)


def _share(yes: Tensor, asked: Tensor) -> Tensor:
    """(n,) share of a person's asked pictures; NaN: none was asked."""
    n = asked.sum(1).float()
    return torch.where(n > 0, (yes & asked).sum(1) / n.clamp(min=1), torch.full_like(n, float("nan")))
