"""A measured number with its interval and its n, and which way is better."""

from __future__ import annotations

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
