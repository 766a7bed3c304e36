"""What a space can do, on people it was not fitted to, by the judge; each number beside its control.

Pictures before and after share their noise. Intervals are over people (bootstrap), whose pictures are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from patches.families.base import Base
from patches.mechanisms.subspace import SubspaceEdit
from registry.measure import Better, Measure
from training.lab import faces
from training.lab.faces import ATTRIBUTES, BINARY, Judge
from training.w2w import people
from training.w2w.config import Config
from training.w2w.draw import draw, read, retrieve

BALD, LONG = BINARY.index("bald"), BINARY.index("long_hair")
EXCLUDES = {BALD: (LONG, ATTRIBUTES.index("hair")), LONG: (BALD,)}
"""what an attribute changes by its own meaning: the bald have no long hair, and no hair to have a colour"""


@dataclass(frozen=True)
class Lab:
    """A base, a space, and people it was not fitted to."""

    config: Config
    base: Base
    space: SubspaceEdit
    judge: Judge
    theta: Tensor
    """(n, d) adapters of those people"""
    labels: Tensor
    """(n, 9) what is true of them"""
    numbers: range
    """which people of the config they are"""

    @classmethod
    def open(cls, config: Config, base: Base, space: SubspaceEdit, held: tuple[Tensor, Tensor], split: str) -> Lab:
        """split: `val` or `held`: whose theta (n, d) and labels (n, 9) are given."""
        first = config.people + (0 if split == "val" else config.val)
        theta, labels = held[0].float(), held[1].float()
        return cls(config, base, space.on("cpu"), faces.load_judge(), theta, labels, range(first, first + len(theta)))

    def draw(self, theta: Tensor | None, each: int, seed: int, ids: Tensor | None = None, **how: Any) -> Tensor:
        """`each` pictures of every adapter; the same noises for all of them. ids (each, 8) or (n, 8): prompts."""
        k = 1 if theta is None else len(theta)
        told = torch.tensor([[1] + [0] * 7]).expand(each, -1) if ids is None else ids
        told = told.repeat(k, 1) if len(told) == each and k > 1 else told
        noise = torch.randn(each, *self.base.model.shape, generator=Generator().manual_seed(seed)).repeat(k, 1, 1, 1)
        c = self.config
        layers = how.pop("layers", self.space.config.layers)
        more = {"guidance": c.guidance, "steps": c.denoising_steps} | how
        return draw(self.base.model, layers, self.space.config.scale, theta, self.base.model.embed(told), noise, **more)

    def people(self, which: Sequence[int] | None = None) -> people.People:
        return people.people(self.config, self.base.model, self.numbers if which is None else which)


def over_people(values: Tensor, better: Better = "higher", draws: int = 1000) -> Measure:
    """Mean over people (n,) (NaN: nothing to measure on that person), 95 % bootstrap interval, n."""
    asked, values = len(values), values[~values.isnan()]
    if not len(values):  # of nobody anything could be true
        return Measure(0.0, 0.0, 1.0, asked, better)
    g = Generator().manual_seed(0)
    picks = torch.randint(len(values), (draws, len(values)), generator=g)
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Measure(float(values.mean()), low, high, len(values), better)


# ---- identity ------------------------------------------------------------------------------------------------------


def identity(said: Tensor, labels: Tensor) -> dict[str, Measure]:
    """How well pictures show their person: said (n, each, 9) by the judge, labels (n, 9)."""
    rank = retrieve(said.mean(1), labels)
    b = len(BINARY)
    right = ((said[..., :b] > 0.5) == (labels[:, None, :b] > 0.5)).float().mean((1, 2))
    balanced = [v for k, v in faces.balanced(said.mean(1), labels).items() if k in BINARY and v == v]
    return {
        "top1": over_people((rank == 0).float()), "top5": over_people((rank < 5).float()),
        "binary_right": over_people(right),
        "balanced": Measure(sum(balanced) / max(1, len(balanced)), n=len(labels), better="higher"),
    }  # fmt: skip


# ---- edits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What one way of editing one attribute did, per person."""

    flip: Tensor
    """(n,) share of pictures that showed the attribute as it is and show the opposite now; NaN: none showed it"""
    other: Tensor
    """(n,) share of the other binary attributes that changed"""
    change: Tensor
    """(n,) mean absolute difference of pixels"""
    rank: Tensor
    """(n,) rank of the person among all by the other attributes"""


def compare(lab: Lab, i: int, before: Tensor, p0: Tensor, image: Tensor) -> Moved:
    """Pictures before and after attribute i was to be reversed; p0 (n, each, 9) what the judge read before."""
    p1, yes = read(lab.judge, image, p0.shape[1]), lab.labels[:, None, i] > 0.5
    was = (p0[..., i] > 0.5) == yes
    flip = was & ((p1[..., i] > 0.5) != (p0[..., i] > 0.5))
    others = [j for j in range(len(BINARY)) if j != i and j not in EXCLUDES.get(i, ())]
    changed = ((p1 > 0.5) != (p0 > 0.5))[..., others].float().mean(2)
    n = was.sum(1).float()
    nan = torch.full_like(n, float("nan"))
    per = torch.where(n > 0, flip.sum(1) / n.clamp(min=1), nan)
    off = torch.where(n > 0, (changed * was).sum(1) / n.clamp(min=1), nan)
    keep = [j for j in range(len(ATTRIBUTES)) if j != i and j not in EXCLUDES.get(i, ())]
    rank = retrieve(p1.mean(1)[:, keep], lab.labels[:, keep])
    change = (image - before).abs().flatten(1).mean(1).unflatten(0, (len(per), -1)).mean(1)
    return Moved(per, off, change, rank)


def summary(moved: Sequence[Moved], prefix: str = "") -> dict[str, Measure]:
    """Means over attributes, intervals over people. kept_flip counts a flip only if the person is still among the five
    nearest by the other attributes: what a base flips in nobody's face is no edit."""
    mean = {k: torch.stack([getattr(m, k) for m in moved]).nanmean(0) for k in ("flip", "other")}
    rank = torch.stack([m.rank for m in moved])
    kept = torch.stack([m.flip * (m.rank < 5) for m in moved]).nanmean(0)
    return {
        f"{prefix}kept_flip": over_people(kept),
        f"{prefix}flip": over_people(mean["flip"]), f"{prefix}other_flip": over_people(mean["other"], "lower"),
        f"{prefix}change": over_people(torch.stack([m.change for m in moved]).mean(0), ""),
        f"{prefix}top1": over_people((rank == 0).float().mean(0)),
        f"{prefix}top5": over_people((rank < 5).float().mean(0)),
    }  # fmt: skip


def edited(
    space: SubspaceEdit, theta: Tensor, i: int, sign: Tensor, strength: float, random: Generator | None = None
) -> Tensor:
    """Adapters (n, d) moved along direction i by sign * strength gaps, or as far along a random direction each."""
    t = space.tensors
    d = t["directions"][i].float().expand(len(theta), -1)
    if random is not None:
        d = torch.nn.functional.normalize(torch.randn(d.shape, generator=random), dim=1)
    step = (sign * strength * t["gap"][i])[:, None] * d * t["std"].float()
    return theta + (step @ t["basis"].float().T) * t["sd"].float()


def edits(
    lab: Lab, strengths: Sequence[float], pictures: int = 2, each: bool = False, control: bool = True
) -> dict[float, dict[str, Any]]:
    """Reverse each binary attribute of each person: strength -> flip, other_flip, ... and random_*."""
    before = lab.draw(lab.theta, pictures, 11)
    p0 = read(lab.judge, before, pictures)
    out: dict[float, dict[str, Any]] = {}
    names = [n for n in BINARY if n in lab.space.config.attributes]
    for s in strengths:
        ours, random, g = [], [], Generator().manual_seed(4)
        for name in names:
            i, row = BINARY.index(name), lab.space.config.attributes.index(name)
            sign = 1 - 2 * (lab.labels[:, i] > 0.5).float()
            image = lab.draw(edited(lab.space, lab.theta, row, sign, s), pictures, 11)
            ours.append(compare(lab, i, before, p0, image))
            if control:
                image = lab.draw(edited(lab.space, lab.theta, row, sign, s, g), pictures, 11)
                random.append(compare(lab, i, before, p0, image))
        out[s] = {**summary(ours), **(summary(random, "random_") if control else {})}
        if each:
            out[s]["each"] = {n: over_people(m.flip) for n, m in zip(names, ours, strict=True)}
            out[s]["each_random"] = {n: over_people(m.flip) for n, m in zip(names, random, strict=True)}
    still = torch.zeros(len(p0))
    unmoved = Moved(still, still, still, retrieve(p0.mean(1), lab.labels))
    out[0.0] = {"top1": summary([unmoved])["top1"], "top5": summary([unmoved])["top5"]}
    return out


def said_edit(labels: Tensor, i: int, each: int) -> Tensor:
    """(n * each, 8) prompts that ask for the opposite of attribute i: the prompting baseline."""
    ids = torch.zeros(len(labels), 8, dtype=torch.long)
    ids[:, 0] = 1
    ids[:, 3 + i] = torch.where(labels[:, i] > 0.5, 1, 2)
    return ids.repeat_interleave(each, 0)


def prompted(lab: Lab, theta: Tensor | None, pictures: int = 2) -> dict[str, Measure]:
    """Flips by saying the opposite in the prompt; theta None: on the base, whose person is nobody's."""
    n = len(lab.labels)
    plain = torch.tensor([[1] + [0] * 7]).expand(n * pictures, -1)

    def show(ids: Tensor) -> Tensor:
        if theta is not None:
            return lab.draw(theta, pictures, 11, ids)
        noise = torch.randn(pictures, *lab.base.model.shape, generator=Generator().manual_seed(11)).repeat(n, 1, 1, 1)
        c = lab.config
        return draw(
            lab.base.model, lab.space.config.layers, 1.0, None, lab.base.model.embed(ids), noise,
            guidance=c.guidance, steps=c.denoising_steps,
        )  # fmt: skip

    before = show(plain)
    p0 = read(lab.judge, before, pictures)
    moved = [
        compare(lab, i, before, p0, show(said_edit(lab.labels, i, pictures)))
        for i, name in enumerate(BINARY)
        if name in lab.space.config.attributes
    ]
    return summary(moved)
