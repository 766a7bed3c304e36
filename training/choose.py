"""Choosing a patch among candidates on val: what every fit does, whatever it fits.

A candidate has a worth: its score if it keeps what must stay, else how far it falls short of keeping it (negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ROUNDING = 1e-9
"""shares of the same pictures that differ by less are equal"""


def worth(score: float, kept: float, floor: float) -> float:
    """`score` of a candidate whose `kept` is not below `floor`; else how far below it is, as a negative number."""
    return score if kept >= floor - ROUNDING else kept - floor


@dataclass(frozen=True)
class Offer(Generic[T]):
    """A candidate as it was judged on val."""

    what: T
    """the candidate itself"""
    row: dict[str, Any]
    """what the evidence says of it; `worth` is in it"""
    kept: float = 0.0
    """Share kept of what must stay"""
    size: int = 0
    """how much is edited, which is what serving it costs"""

    @property
    def score(self) -> tuple[float, float]:
        """By worth; of equals, what keeps more of what must stay is better."""
        return self.row["worth"], self.kept


def best(offers: Sequence[Offer[T]], within: float = 0.0) -> Offer[T]:
    """The best candidate; if it keeps what must stay, the smallest one whose worth is less than `within` below it."""
    first = max(offers, key=lambda o: o.score)
    near = [o for o in offers if o.score[0] > first.score[0] - within > 0]
    return min(near, key=lambda o: (o.size, *(-x for x in o.score)), default=first)
