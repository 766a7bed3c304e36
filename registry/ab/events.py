"""The event log of experiments: who was shown which arm, and how it went. Append-only, on this machine.

A call returns (or its future resolves) only when the event is on the disk: sqlite in WAL with synchronous=FULL, one
writer thread that commits everything waiting in one transaction, so that an fsync is shared by all who wait. What was
acknowledged survives kill -9. `summary` folds only events it has not seen yet into running totals.
"""

from __future__ import annotations

import bisect
import queue
import sqlite3
import threading
import time
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from registry.ab.experiment import CONTROL, P99_BETS, TREATMENT, Arm, ArmStats, Experiment, Summary, bet_p99
from registry.errors import NotFound
from registry.home import home

MAX_BATCH = 2048
"""events in one transaction"""
P99_FROM = 100
"""control calls before its p99 means anything"""

_TABLES = """
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, experiment TEXT NOT NULL, unit TEXT NOT NULL, arm TEXT, digest TEXT,
  share REAL, request TEXT, at REAL NOT NULL, status INTEGER, latency_ms REAL, value REAL, key TEXT
);
CREATE INDEX IF NOT EXISTS by_experiment ON events (experiment, id);
CREATE UNIQUE INDEX IF NOT EXISTS once ON events (experiment, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS exposed ON events (experiment, unit) WHERE kind = 'exposure';
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""
_COLUMNS = (
    "kind", "experiment", "unit", "arm", "digest", "share", "request", "at", "status", "latency_ms", "value", "key",
)  # fmt: skip
_INSERT = f"INSERT OR IGNORE INTO events ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"


class Events:
    """The log of one deployment. Any number of processes may write; each has its own writer thread."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path(path or home() / "events.db")
        with closing(self._open()) as db:
            db.executescript(_TABLES)
        self._waiting: queue.SimpleQueue[tuple[tuple[Any, ...], Future[bool]] | None] = queue.SimpleQueue()
        self._totals: dict[str, _Totals] = {}
        self._folding = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="events", daemon=True)
        self._writer.start()

    def expose(
        self, experiment: Experiment, unit: str, arm: Arm, *, request: str = "", status: int = 200,
        latency_ms: float | None = None,
    ) -> Future[bool]:  # fmt: skip
        """A unit was answered (or failed) by an arm. The future resolves once it is durable."""
        return self._put(
            kind="exposure", experiment=experiment.name, unit=unit, arm=arm, digest=experiment.arm_digest(arm),
            share=experiment.share, request=request, status=status, latency_ms=latency_ms,
        )  # fmt: skip

    def outcome(
        self, experiment: Experiment, unit: str, value: float, *, arm: Arm | None = None, key: str | None = None
    ) -> Future[bool]:
        """A unit's outcome (checked before: experiment.check_value). False if the key was seen already: counted once.

        arm: in shadow mode, whose answer it judges; in a split the unit's exposure says.
        """
        return self._put(kind="outcome", experiment=experiment.name, unit=unit, arm=arm, value=value, key=key)

    def drop(self, experiment: Experiment, unit: str) -> Future[bool]:
        """A shadow answer that was given up under load."""
        return self._put(kind="drop", experiment=experiment.name, unit=unit)

    def arm_of(self, experiment: str, unit: str) -> Arm:
        """The arm a unit saw first. Raises NotFound for a unit that never saw any."""
        with closing(self._open()) as db:
            row = db.execute(
                "SELECT arm FROM events WHERE experiment = ? AND unit = ? AND kind = 'exposure' ORDER BY id LIMIT 1",
                (experiment, unit),
            ).fetchone()
        if row is None:
            raise NotFound(f"Unit {unit[:60]!r} was never answered in experiment {experiment}; send its request first.")
        arm: Arm = row[0]
        return arm

    def summary(self, experiment: Experiment) -> Summary:
        """Everything known, folding in what is new since the last time."""
        with self._folding:
            totals = self._totals.setdefault(experiment.name, _Totals())
            with closing(self._open()) as db:
                rows = db.execute(
                    "SELECT id, kind, unit, arm, share, status, latency_ms, value FROM events "
                    "WHERE experiment = ? AND id > ? ORDER BY id",
                    (experiment.name, totals.seen),
                )
                for row in rows:
                    totals.fold(experiment, *row)
            return totals.summary()

    def trajectory(self, experiment: Experiment, points: int = 100) -> list[Summary]:
        """The summaries one would have seen after every so many events; the last one is of all of them."""
        with closing(self._open()) as db:
            rows = db.execute(
                "SELECT id, kind, unit, arm, share, status, latency_ms, value FROM events "
                "WHERE experiment = ? ORDER BY id",
                (experiment.name,),
            ).fetchall()
        totals, seen = _Totals(), []
        every = max(1, len(rows) // points)
        for n, row in enumerate(rows, 1):
            totals.fold(experiment, *row)
            if n % every == 0 or n == len(rows):
                seen.append(totals.summary())
        return seen

    def count(self) -> int:
        """Events on the disk."""
        with closing(self._open()) as db:
            return int(db.execute("SELECT COUNT(*) FROM events").fetchone()[0])

    def close(self) -> None:
        """Write what waits, then stop the writer."""
        self._waiting.put(None)
        self._writer.join()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, **event: Any) -> Future[bool]:
        future: Future[bool] = Future()
        event["at"] = time.time()
        self._waiting.put((tuple(event.get(c) for c in _COLUMNS), future))
        return future

    def _write(self) -> None:
        with closing(self._open()) as db:
            while (first := self._waiting.get()) is not None:
                batch, last = [first], False
                while len(batch) < MAX_BATCH:
                    try:
                        more = self._waiting.get_nowait()
                    except queue.Empty:
                        break
                    if more is None:
                        last = True
                        break
                    batch.append(more)
                self._commit(db, batch)
                if last:
                    return

    @staticmethod
    def _commit(db: sqlite3.Connection, batch: list[tuple[tuple[Any, ...], Future[bool]]]) -> None:
        try:
            db.execute("BEGIN IMMEDIATE")
            written = [db.execute(_INSERT, row).rowcount == 1 for row, _ in batch]
            db.execute("COMMIT")
        except sqlite3.Error as e:
            if db.in_transaction:
                db.execute("ROLLBACK")
            for _, future in batch:
                future.set_exception(e)
            return
        for (_, future), new in zip(batch, written, strict=True):
            future.set_result(new)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        return db


@dataclass
class _Unit:
    """What one unit did."""

    arm: Arm
    n: int = 0
    total: float = 0.0
    crossed: bool = False
    answers: dict[str, float] = field(default_factory=dict)
    """shadow: arm -> its outcome"""


@dataclass
class _Totals:
    """Running totals of one experiment; memory grows with its units, time with its new events."""

    seen: int = 0
    arms: dict[Arm, ArmStats] = field(default_factory=lambda: {CONTROL: ArmStats(), TREATMENT: ArmStats()})
    units: dict[str, _Unit] = field(default_factory=dict)
    ratio: dict[float, tuple[int, int]] = field(default_factory=dict)
    crossovers: int = 0
    wins: int = 0
    losses: int = 0
    pairs: int = 0
    pair_total: float = 0.0
    pair_squares: float = 0.0
    slow: list[float] = field(default_factory=list)
    """the control's slowest calls, ascending, as many as its p99 needs"""
    p99: tuple[float, ...] = (0.0,) * len(P99_BETS)
    p99_calls: int = 0
    dropped: int = 0

    def fold(
        self, x: Experiment, id: int, kind: str, unit: str, arm: Arm | None, share: float | None,
        status: int | None, latency_ms: float | None, value: float | None,
    ) -> None:  # fmt: skip
        self.seen = id
        if kind == "exposure" and arm is not None:
            self._expose(x, unit, arm, share or 0.0, status or 0, latency_ms)
        elif kind == "outcome" and value is not None:
            self._outcome(unit, arm, value)
        elif kind == "drop":
            self.dropped += 1

    def _expose(self, x: Experiment, unit: str, arm: Arm, share: float, status: int, latency_ms: float | None) -> None:
        stats = self.arms[arm]
        self.arms[arm] = replace(stats, calls=stats.calls + 1, errors=stats.errors + (status >= 500 or status == 0))
        known = self.units.get(unit)
        if known is None:
            self.units[unit] = _Unit(arm)
            self.arms[arm] = replace(self.arms[arm], units=stats.units + 1)
            if x.mode == "split":
                c, t = self.ratio.get(share, (0, 0))
                self.ratio[share] = (c, t + 1) if arm == TREATMENT else (c + 1, t)
        elif known.arm != arm and not known.crossed and x.mode == "split":
            known.crossed = True
            self.crossovers += 1
        if latency_ms is not None:
            self._latency(x, arm, latency_ms)

    def _outcome(self, unit: str, arm: Arm | None, value: float) -> None:
        known = self.units.get(unit)
        if known is None:
            return  # a unit that never saw an arm says nothing about one
        if arm is not None:
            before = len(known.answers)
            known.answers.setdefault(arm, value)
            if before == 1 and len(known.answers) == 2:
                d = known.answers[TREATMENT] - known.answers[CONTROL]
                self.pairs += 1
                self.wins += d > 0
                self.losses += d < 0
                self.pair_total += d
                self.pair_squares += d * d
            if len(known.answers) == before:
                return
        if known.crossed:
            return  # after a crossover the outcome belongs to neither arm
        of = arm or known.arm
        stats = self.arms[of]
        if arm is not None:  # shadow: every outcome is one of that arm
            self.arms[of] = _add(stats, 1, value, value * value)
            return
        old = known.total / known.n if known.n else 0.0
        known.n, known.total = known.n + 1, known.total + value
        new = known.total / known.n
        self.arms[of] = _add(stats, known.n == 1, new - old, new * new - old * old)

    def _latency(self, x: Experiment, arm: Arm, latency_ms: float) -> None:
        calls = self.arms[CONTROL].calls
        if arm == CONTROL:
            bisect.insort(self.slow, latency_ms)
            # the p99 of n calls is the (n/100)-th slowest; keep twice that, so that it can be found while n grows
            if len(self.slow) > max(64, calls // 50):
                self.slow.pop(0)
            return
        limit = next((g.limit for g in x.guardrails if g.metric == "latency_p99_ratio"), None)
        if limit is None or calls < P99_FROM:
            return
        self.p99 = bet_p99(self.p99, latency_ms > limit * self.slow[-max(1, calls // 100)])
        self.p99_calls += 1

    def summary(self) -> Summary:
        return Summary(
            self.arms[CONTROL], self.arms[TREATMENT], dict(self.ratio), self.crossovers, self.pairs, self.wins,
            self.losses, self.pair_total, self.pair_squares, self.p99, self.p99_calls, self.dropped,
        )  # fmt: skip


def _add(s: ArmStats, n: int, total: float, squares: float) -> ArmStats:
    return replace(s, n=s.n + n, total=s.total + total, squares=s.squares + squares)
