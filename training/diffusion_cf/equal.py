"""Compare ways of editing at equal flips: how much each changes a picture to reach the same share of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.diffusion_cf.judges import Judged


@dataclass(frozen=True, eq=False)
class Curve:
    """One way of editing at k rising strengths, over n pictures."""

    flip: Tensor
    """(k, n) whether both judges say the target"""
    change: Tensor
    """(k, n) mean absolute difference of pixels"""
    group: Tensor
    """(n,) the drawing a picture is of"""

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Curve:
        """judged: by rising strength, the first of them unedited."""
        flip, change = (torch.stack([j.values[k] for j in judged]) for k in ("flip_both", "l1"))
        return cls(flip, change, judged[0].sprite)

    def at(self, flip: float, weights: Tensor) -> float:
        """Change at a share of flips, on straight lines between strengths; NaN if no strength flips as many. weights
        (n,) of the pictures."""
        w = weights / weights.sum()
        share, cost = (self.flip @ w).tolist(), (self.change @ w).tolist()
        for i in range(1, len(share)):
            if share[i - 1] < flip <= share[i]:
                part = (flip - share[i - 1]) / (share[i] - share[i - 1])
                return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))
        return float("nan")


def at_flip(curve: Curve, other: Curve, flip: float, draws: int = 1000) -> dict[str, list[float]]:
    """`l1` of a curve at a share of flips, and `more`, its ratio to that of `other`; 95 % bootstrap over drawings.

    Draws in which either never flips as many are left out; `reached` is the share of the rest. Empty where the curve
    itself does not reach it.
    """
    ids, at = torch.unique(curve.group, return_inverse=True)
    g, n = torch.Generator().manual_seed(0), len(at)
    every = torch.ones(n)
    here, there = curve.at(flip, every), other.at(flip, every)
    highest = float(curve.flip.mean(1).max())
    if here != here or there != there:
        return {"highest flip": [highest]}
    pairs = []
    for _ in range(draws):
        times = torch.bincount(torch.randint(len(ids), (len(ids),), generator=g), minlength=len(ids)).float()
        pairs.append((curve.at(flip, times[at]), other.at(flip, times[at])))
    drawn = torch.tensor(pairs)
    drawn = drawn[~drawn.isnan().any(1)]
    ends = torch.tensor([0.025, 0.975])
    out = {"highest flip": [highest], "reached": [len(drawn) / draws]}
    for name, value, values in (("l1", here, drawn[:, 0]), ("more", here / there, drawn[:, 0] / drawn[:, 1])):
        low, high = values.quantile(ends).tolist()
        out[name] = [value, low, high, n]
    return out
