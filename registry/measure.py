"""A measured number with its interval and its n, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Measure:
    """One metric of one arm. A number that has no interval (a count, a setting) leaves low, high and n out."""

    value: float
    low: float | None = None
    """ends of the 95 % interval"""
    high: float | None = None
    n: int | None = None
    """independent things it was measured on"""
    better: Better = ""

    def __float__(self) -> float:
        return float(self.value)


Metrics = Mapping[str, "float | Measure"]


def measures(metrics: Metrics) -> dict[str, Measure]:
    """The same with every plain number as a Measure."""
    return {k: v if isinstance(v, Measure) else Measure(float(v)) for k, v in metrics.items()}


def flat(metrics: Metrics) -> dict[str, float]:
    """Plain numbers for MLflow: `name`, and `name/low`, `name/high`, `name/n` where they are known."""
    out: dict[str, float] = {}
    for name, m in measures(metrics).items():
        out[name] = float(m.value)
        parts = {"low": m.low, "high": m.high, "n": m.n}
        out |= {f"{name}/{part}": float(x) for part, x in parts.items() if x is not None}
    return out


def unflat(numbers: Mapping[str, float], better: Mapping[str, str] | None = None) -> dict[str, Measure]:
    """What `flat` made flat, as measures again. better: name -> "higher" or "lower", where it is known."""
    out = {}
    for name, value in numbers.items():
        whole, _, part = name.rpartition("/")
        if part in ("low", "high", "n") and whole in numbers:
            continue
        n = numbers.get(f"{name}/n")
        ends = numbers.get(f"{name}/low"), numbers.get(f"{name}/high")
        way = (better or {}).get(name, "")
        out[name] = Measure(value, *ends, None if n is None else int(n), way if way in ("higher", "lower") else "")  # type: ignore[arg-type]
    return out


def contrast(a: Measure, b: Measure) -> float:
    """|b - a| in units of the half width of its 95 % interval, the two arms taken as independent; without intervals
    relative to the larger of the two, and always less than 1."""
    apart = abs(b.value - a.value)
    if not apart:
        return 0.0
    if None in (a.low, a.high, b.low, b.high):
        return 0.99 * apart / (abs(a.value) + abs(b.value))
    half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)  # type: ignore[operator]
    return apart / half if half else math.inf
