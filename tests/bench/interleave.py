"""Timings that can be compared: every variant runs once per round, in turn, so that drift hits all alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How long a variant takes, as a multiple of the first one, measured pair by pair."""

    median: float
    low: float
    high: float
    """95 % bootstrap interval of the median"""
    rounds: int


def interleave(
    variants: dict[str, Callable[[], object]], rounds: int, warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each call, variants in a new random order every round; the first `warmup` rounds are thrown away.

    clock: time.process_time counts this process's CPU alone, which other load on the machine hardly moves.
    """
    order, rng = list(variants), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for n in range(warmup + rounds):
        rng.shuffle(order)
        for name in order:
            start = clock()
            variants[name]()
            if n >= warmup:
                times[name].append(clock() - start)
    return times


def ratio(a: list[float], b: list[float]) -> Ratio:
    """a / b, round by round."""
    pairs = [x / y for x, y in zip(a, b, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(pairs, k=len(pairs))) for _ in range(2000))
    return Ratio(statistics.median(pairs), medians[50], medians[-51], len(pairs))
