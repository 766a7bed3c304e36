"""Model selection: choose a patch among candidates on val. Every system's fit uses it.

A candidate's worth is its score if it meets the constraint (a metric that must not fall below a floor); otherwise it is
negative, by how much the constraint is violated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ROUNDING = 1e-9
"""Tolerance within which accuracies on the same images count as equal"""


def worth(score: float, kept: float, floor: float) -> float:
    """Return `score` if `kept` reaches `floor`; otherwise the (negative) shortfall `kept - floor`."""
    return score if kept >= floor - ROUNDING else kept - floor


@dataclass(frozen=True)
class Offer(Generic[T]):
    """A candidate as judged on val."""

    what: T
    """The candidate itself"""
    row: dict[str, Any]
    """Row of the sealed evidence that describes it; contains `worth`"""
    kept: float = 0.0
    """Value of the metric that must not fall"""
    size: int = 0
    """Number of edited units, which determines the cost of serving"""

    @property
    def score(self) -> tuple[float, float]:
        """Sort key: worth, then the metric to keep."""
        return self.row["worth"], self.kept


def best(offers: Sequence[Offer[T]], within: float = 0.0) -> Offer[T]:
    """Return the best candidate; if it meets the constraint, the smallest with worth less than `within` below it."""
    first = max(offers, key=lambda o: o.score)
    near = [o for o in offers if o.score[0] > first.score[0] - within > 0]
    return min(near, key=lambda o: (o.size, *(-x for x in o.score)), default=first)
