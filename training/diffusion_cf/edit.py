"""Counterfactuals of pictures: inverted once, then regenerated under moved conditions, all rows in one running
batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from patches.families.diffusion import Condition, Denoiser, Denoising, Invert, Regenerate
from patches.families.worker import WorkerSettings
from patches.mechanisms.direction import STILL, move
from training.progress import tqdm

ROWS = 16
"""rows of one forward; more do not pay on a CPU"""


@dataclass(frozen=True)
class How:
    """How pictures are inverted and regenerated."""

    method: str = "fixed_point"
    """see patches.families.diffusion.inversion.METHODS"""
    levels: tuple[int, ...] = ()
    iterations: int = 3
    guidance: float = 2.0
    """w of out = other + w (moved - other)"""
    against: Literal["source", "null"] = "source"
    """what guidance starts from: the picture's own condition, or none at all, as published"""
    skip: int = 0
    """Noisiest levels that are left out, for the method `edit_friendly`"""
    norm: Literal["unit", "free"] = "unit"


class Editor:
    """A base that makes counterfactuals. `evaluations` counts denoiser outputs, both halves of guidance."""

    def __init__(self, subject: Any, site: str = "image", arm: str | None = None) -> None:
        """arm: whose tuned denoiser inverts and regenerates; its own move is not made. None: the base's."""
        self.pipe, self.site, self.arm = subject.base.model, site, arm
        self.said = dict(STILL) if arm is not None else {}
        self.worker = Denoiser(subject, WorkerSettings(slots=ROWS))
        self.evaluations = 0

    def conditions(self, pictures: Tensor, batch: int = 64) -> list[Condition]:
        """What the model is told to make pictures like (n, 3, H, W)."""
        return [c for part in torch.split(pictures, batch) for c in self.pipe.image(part)]

    def vectors(self, conditions: Sequence[Condition]) -> Tensor:
        """(n, ...) the condition that is moved."""
        return torch.stack([c[self.site] for c in conditions])

    def invert(self, pictures: Tensor, conditions: Sequence[Condition], how: How, seed: int = 0) -> list[Tensor]:
        """The state each picture inverts to, under its own condition."""
        x = self.pipe.latents(pictures)
        program = Invert(how.method, how.levels, how.iterations)
        rows = [
            Denoising(condition=c, start=z, seed=seed + i, program=program, decode=False, arm=self.arm)
            for i, (c, z) in enumerate(zip(conditions, x, strict=True))
        ]
        return [row.out for row in self.run(rows, "inversion") if row.out is not None]

    def regenerate(
        self, states: Sequence[Tensor], conditions: Sequence[Condition], moved: Sequence[Condition], how: How
    ) -> Tensor:
        """(n, 3, H, W) pictures from states, asked for what `moved` says."""
        program = Regenerate(how.method, how.levels, how.skip)
        rows = [
            Denoising(
                condition=m,
                other=c if how.against == "source" else None,
                guidance=how.guidance,
                start=s,
                program=program,
                arm=self.arm,
                params=self.said,
            )
            for s, c, m in zip(states, conditions, moved, strict=True)
        ]
        return torch.stack([r.picture for r in self.run(rows, "regeneration") if r.picture is not None])

    def moved(self, conditions: Sequence[Condition], directions: Tensor, how: How) -> list[Condition]:
        """Conditions with `directions` (n, ...) added to the unit condition."""
        new = move(self.vectors(conditions), directions, how.norm)
        return [{**c, self.site: v} for c, v in zip(conditions, new, strict=True)]

    def along(
        self,
        states: Sequence[Tensor],
        conditions: Sequence[Condition],
        directions: Tensor,
        amount: float | Tensor,
        how: How,
    ) -> Tensor:
        """Pictures moved by `amount` (a number or (n,)) times `directions` (n, ...)."""
        scale = torch.as_tensor(amount).reshape(-1, *[1] * (directions.ndim - 1))
        return self.regenerate(states, conditions, self.moved(conditions, scale * directions, how), how)

    def run(self, rows: list[Denoising], what: str) -> list[Denoising]:
        for i in tqdm(range(0, len(rows), ROWS), what, disable=None, leave=False):
            self.worker.run(rows[i : i + ROWS])
        for row in rows:
            if row.error is not None:
                raise row.error
            self.evaluations += row.evaluations
        return rows


def smallest(
    make: Callable[[Tensor, Tensor], Tensor],
    flipped: Callable[[Tensor, Tensor], Tensor],
    count: int,
    top: float,
    rounds: int = 5,
) -> tuple[Tensor, Tensor]:
    """The smallest amount in (0, top] at which each picture flips, by bisection, to top / 2^rounds.

    make(indices, amounts) -> pictures; flipped(indices, pictures) -> (k,) bool. Returns amounts (n,), NaN where
    `top` does not flip either, and the pictures at them (n, 3, H, W), at `top` where nothing flips. Assumes that
    flipping is monotone, which it nearly is.
    """
    every = torch.arange(count)
    best = make(every, torch.full((count,), top))
    ok = flipped(every, best)
    low, high = torch.zeros(count), torch.full((count,), top)
    for _ in range(rounds):
        at = torch.where(ok)[0]
        if not len(at):
            break
        middle = (low[at] + high[at]) / 2
        made = make(at, middle)
        yes = flipped(at, made)
        high[at[yes]], low[at[~yes]] = middle[yes], middle[~yes]
        best[at[yes]] = made[yes]
    return torch.where(ok, high, torch.nan), best
