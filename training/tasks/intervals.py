"""Intervals of what is measured, in the form every report keeps: value, low, high, n."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wilson(yes: Tensor | Sequence[bool]) -> list[float]:
    """Share, 95 % Wilson interval, n, of (n,) 0 or 1."""
    n, k, z = len(yes), float(torch.as_tensor(yes).float().sum()), 1.96
    center, spread = (k + z * z / 2) / (n + z * z), z * (k * (n - k) / n + z * z / 4) ** 0.5 / (n + z * z)
    return [round(v, 4) for v in (k / n, center - spread, center + spread)] + [n]


def ratio_interval(a: list[tuple[float, int]], b: list[tuple[float, int]]) -> list[float]:
    """Perplexity of a over b, 95 % bootstrap interval over documents, tokens."""
    rng = torch.Generator().manual_seed(0)
    d = torch.tensor([(x[0] - y[0], x[1]) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    picks = torch.randint(len(a), (2000, len(a)), generator=rng)
    means = (d[picks, 0].sum(1) / d[picks, 1].sum(1)).exp().sort().values
    whole = float((d[:, 0].sum() / d[:, 1].sum()).exp())
    return [round(v, 5) for v in (whole, float(means[50]), float(means[-51]))] + [int(d[:, 1].sum())]
