"""95 % confidence intervals: of a proportion (Wilson), a mean (normal), and a perplexity (bootstrap over documents).

`wilson` and `ratio_interval` return the row that sealed evidence keeps: [value, low, high, n]. The others return a
`Measure`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from registry.measure import Better, Measure

Z = 1.96
DRAWS = 2000
"""Number of bootstrap resamples"""
Loss = tuple[float, int]
"""Summed negative log-likelihood of a document in nats, and the number of its scored tokens"""


def wilson(yes: Tensor | Sequence[bool]) -> list[float]:
    """Return proportion, Wilson interval and n of (n,) outcomes 0 or 1, as a row [proportion, low, high, n]."""
    n, k, z = len(yes), float(torch.as_tensor(yes).float().sum()), Z
    center, spread = (k + z * z / 2) / (n + z * z), z * (k * (n - k) / n + z * z / 4) ** 0.5 / (n + z * z)
    return [round(v, 4) for v in (k / n, center - spread, center + spread)] + [n]


def ratio_interval(a: Sequence[Loss], b: Sequence[Loss]) -> list[float]:
    """Bootstrap the ratio of perplexities a / b on the same documents: a row [ratio, low, high, tokens].

    Documents are resampled.
    """
    d = torch.tensor([(x[0] - y[0], x[1]) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    whole, low, high = _perplexity(d)
    return [round(v, 5) for v in (whole, low, high)] + [int(d[:, 1].sum())]


def share(yes: Tensor | Sequence[bool], better: Better = "higher") -> Measure:
    """Return the proportion of ones among (n,) outcomes with its Wilson interval; 0 with interval [0, 1] if n is 0."""
    n = len(yes)
    if not n:
        return Measure(0.0, 0.0, 1.0, 0, better)
    value = round(float(torch.as_tensor(yes).float().mean()), 6)
    _, low, high, _ = wilson(yes)
    return Measure(value, low, high, n, better)


def mean(values: Tensor | Sequence[float], better: Better = "higher") -> Measure:
    """Return the mean of (n,) independent numbers with its normal interval."""
    x = torch.as_tensor(values, dtype=torch.float64)
    half = Z * float(x.std()) / len(x) ** 0.5 if len(x) > 1 else 0.0
    return Measure(round(float(x.mean()), 6), round(float(x.mean()) - half, 6), round(float(x.mean()) + half, 6),
                   len(x), better)  # fmt: skip


def perplexity(parts: Sequence[Loss]) -> Measure:
    """Return the perplexity exp(mean loss per token) with a bootstrap interval; n is the number of documents."""
    whole, low, high = _perplexity(torch.tensor(parts, dtype=torch.float64))
    return Measure(round(whole, 6), round(low, 6), round(high, 6), len(parts), "lower")


def _perplexity(parts: Tensor) -> tuple[float, float, float]:
    """Return the perplexity of (n, 2) losses and token counts, and its 2.5 % and 97.5 % bootstrap quantiles."""
    picks = torch.randint(len(parts), (DRAWS, len(parts)), generator=torch.Generator().manual_seed(0))
    drawn = (parts[picks, 0].sum(1) / parts[picks, 1].sum(1)).exp().sort().values
    whole = float((parts[:, 0].sum() / parts[:, 1].sum()).exp())
    return whole, float(drawn[DRAWS // 40]), float(drawn[-DRAWS // 40 - 1])
