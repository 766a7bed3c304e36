"""The gate: what a recipe promises of its artifact, and whether what was measured keeps it. Pure functions over values.

A system says what it promises (`promises` of its job); `patchbay gate REF` measures it, and what has not passed is
neither promoted nor tried on users unless somebody says why it should be. What was not measured keeps no promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.measure import Measure

LATENCY = "latency"
"""metric that every gate measures itself: seconds of the patched arm over seconds of the base, runs interleaved"""
Asks = Literal["least", "most", "gain", "loss", "ratio"]
WORDS: dict[str, str] = {
    "least": "at least", "most": "at most", "gain": "better than the base by more than",
    "loss": "worse than the base by at most", "ratio": "over the base's at most",
}  # fmt: skip


@dataclass(frozen=True)
class Promise:
    """One number that must hold of an artifact before it may be promoted."""

    metric: str
    """a metric that the system's `evaluate` gives both sides, or LATENCY"""
    asks: Asks
    """least, most: of the patched side itself. gain, loss: of its distance to the base, in the metric's better
    direction (higher, where it names none). ratio: of patched over base, both more than 0"""
    limit: float
    sure: bool = False
    """whether the whole 95 % interval must keep the limit, or only the number. A gain is to be shown; that a loss is
    less than a point takes thousands of pictures to show"""

    def __str__(self) -> str:
        return f"{self.metric} {WORDS[self.asks]} {self.limit:g}{' for sure' if self.sure else ''}"


def gain(metric: str, limit: float = 0.0, sure: bool = True) -> Promise:
    """The patched side is better than the base by more than `limit`."""
    return Promise(metric, "gain", limit, sure)


def loss(metric: str, limit: float) -> Promise:
    """The patched side is worse than the base by at most `limit`."""
    return Promise(metric, "loss", limit)


def ratio(metric: str, limit: float) -> Promise:
    """The patched side's number is at most `limit` times the base's; for what is less when it is better."""
    return Promise(metric, "ratio", limit)


def latency(limit: float) -> Promise:
    """The patched side takes at most `limit` times as long as the base."""
    return Promise(LATENCY, "most", limit)


@dataclass(frozen=True)
class Verdict:
    """A promise beside what was measured."""

    promise: Promise
    value: float | None
    """what is held against the limit: the metric, or the distance to the base; None: it was not measured"""
    low: float | None
    high: float | None
    """ends of its 95 % interval"""
    n: int | None
    kept: bool

    def __str__(self) -> str:
        if self.value is None:
            return f"BROKEN  {self.promise}: not measured"
        interval = f" [{self.low:.3g}, {self.high:.3g}]" if self.low is not None and self.high is not None else ""
        count = f", n {self.n:,}" if self.n else ""
        return f"{'kept  ' if self.kept else 'BROKEN'}  {self.promise}: {self.value:.4g}{interval}{count}"


@dataclass(frozen=True)
class Gated:
    """What came of an artifact's promises."""

    digest: str
    recipe: str
    """system/recipe that promised"""
    dataset: tuple[str, str]
    """name and digest of what was measured on"""
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        return bool(self.verdicts) and all(v.kept for v in self.verdicts)

    @property
    def status(self) -> Literal["passed", "failed"]:
        return "passed" if self.passed else "failed"

    def evidence(self) -> dict[str, Any]:
        """As JSON, for the ledger and the store."""
        promises = [{**asdict(v), "says": str(v)} for v in self.verdicts]
        about = {"digest": self.digest, "status": self.status, "recipe": self.recipe, "dataset": list(self.dataset)}
        return {"gate": {**about, "promises": promises}}

    def metrics(self) -> dict[str, Measure]:
        """What was held against each limit, as metrics of the version."""
        shown = [v for v in self.verdicts if v.value is not None]
        return {f"gate/{v.promise.metric}": Measure(v.value or 0.0, v.low, v.high, v.n, _better(v)) for v in shown}


def judge(
    digest: str,
    recipe: str,
    dataset: tuple[str, str],
    promises: Sequence[Promise],
    sides: Mapping[str, Mapping[str, Measure]],
) -> Gated:
    """Hold "base" and "patched" -> metric -> what was measured against the promises. LATENCY is of "patched"."""
    base, patched = sides.get("base", {}), sides.get("patched", {})
    verdicts = tuple(_verdict(p, base.get(p.metric), patched.get(p.metric)) for p in promises)
    return Gated(digest, recipe, dataset, verdicts)


def _verdict(promise: Promise, base: Measure | None, patched: Measure | None) -> Verdict:
    found = patched
    if promise.asks in ("gain", "loss", "ratio"):
        found = None if base is None or patched is None else _beside(promise.asks, base, patched)
    if found is None or not math.isfinite(found.value):
        return Verdict(promise, None, None, None, None, False)
    upward = promise.asks in ("least", "gain")
    end = found.low if upward else found.high
    at = found.value if not promise.sure or end is None else end
    # a gain of nothing is none; every other limit is kept when it is met
    strict = promise.asks == "gain"
    kept = (at > promise.limit if strict else at >= promise.limit) if upward else at <= promise.limit
    return Verdict(promise, found.value, found.low, found.high, found.n, kept)


def _beside(asks: Asks, base: Measure, patched: Measure) -> Measure | None:
    if asks == "ratio":
        logs = [_logarithm(m) for m in (base, patched)]
        apart = distance(*logs) if all(m is not None for m in logs) else None  # type: ignore[arg-type]
        return None if apart is None else _mapped(apart, math.exp)
    return distance(base, patched) if asks == "gain" else _turned(distance(base, patched))


def distance(base: Measure, patched: Measure) -> Measure:
    """By how much `patched` is better than `base`, with the interval that the two intervals give when the arms are
    taken as independent (Newcombe 1998, method 10; for other numbers Zou and Donner 2008)."""
    a, b = (base, patched) if "lower" not in (base.better, patched.better) else (_turned(base), _turned(patched))
    d = b.value - a.value
    n = min((m.n for m in (a, b) if m.n is not None), default=None)
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Measure(d, n=n, better="higher")
    low = d - math.hypot(b.value - b.low, a.high - a.value)
    high = d + math.hypot(b.high - b.value, a.value - a.low)
    return Measure(d, low, high, n, "higher")


def _logarithm(m: Measure) -> Measure | None:
    """Of a number above 0; an interval that reaches 0 is left out."""
    if m.value <= 0:
        return None
    return _mapped(m if m.low is None or m.low > 0 else Measure(m.value, n=m.n), math.log)


def _mapped(m: Measure, of: Any) -> Measure:
    """The same under a growing function, which way is better left out."""
    low, high = (None, None) if m.low is None or m.high is None else (of(m.low), of(m.high))
    return Measure(of(m.value), low, high, m.n)


def _turned(m: Measure) -> Measure:
    """The same number with the opposite sign."""
    low, high = (None, None) if m.low is None or m.high is None else (-m.high, -m.low)
    return Measure(-m.value, low, high, m.n)


def _better(v: Verdict) -> Literal["higher", "lower"]:
    return "higher" if v.promise.asks in ("least", "gain") else "lower"
