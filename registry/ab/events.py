"""The event log of experiments: who was shown which arm, and how it went. Append-only.

A call returns (or its future resolves) only when the event is on the disk (registry/ab/database.py): one writer thread
commits everything waiting in one transaction, so that an fsync is shared by all who wait. What was acknowledged
survives kill -9. `summary` folds only events it has not seen yet into running totals.

Nothing that happens to one event or to one who waits for it ends the writer: an event that cannot be stored fails
alone, a disk that is full or locked is tried again for GIVE_UP_S and then counted in `lost`, and nobody can cancel what
is on its way to the disk.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    func,
    select,
    text,
)
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError, TimeoutError

from registry.ab.database import Database
from registry.ab.experiment import CONTROL, OWNER, P99_BETS, TREATMENT, Arm, ArmStats, Experiment, Summary, bet_p99
from registry.errors import NotFound, NotReady

log = logging.getLogger("patchbay")

MAX_BATCH = 2048
"""events in one transaction"""
MAX_WAITING = 50_000
"""events that may wait for the disk; more are refused"""
GIVE_UP_S = 10.0
"""how long a disk that is full or locked is tried again before what waits is given up"""
BUSY_S = 2.0
"""how long one try waits for other writers"""
HUNG_S = 60.0
"""a writer that has work and has done none of it for so long is not well"""
CLOSE_S = 5.0
TOKEN_UNITS, UNIT_CALLS = 20, 20
"""units that a token has before its share is looked at, and calls of a token's unit that count"""
P99_FROM = 100
"""control calls before its p99 means anything"""

_TABLES = MetaData()
EVENTS = Table(
    "events", _TABLES,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("kind", Text, nullable=False), Column("experiment", Text, nullable=False),
    Column("unit", Text, nullable=False), Column("arm", Text), Column("digest", Text), Column("share", Double),
    Column("request", Text), Column("at", Double, nullable=False), Column("status", Integer),
    Column("latency_ms", Double), Column("value", Double), Column("key", Text),
)  # fmt: skip
_E = EVENTS.c
Index("by_experiment", _E.experiment, _E.id)
Index(
    "once", _E.experiment, _E.key, unique=True,
    sqlite_where=_E.key.is_not(None), postgresql_where=_E.key.is_not(None),
)  # fmt: skip
Index(
    "exposed",
    _E.experiment,
    _E.unit,
    sqlite_where=text("kind = 'exposure'"),
    postgresql_where=text("kind = 'exposure'"),
)
_COLUMNS = tuple(c.name for c in _E if c.name != "id")
_INSERT = text(
    f"INSERT INTO events ({', '.join(_COLUMNS)}) VALUES ({', '.join(':' + c for c in _COLUMNS)}) ON CONFLICT DO NOTHING"
)
_FOLDED = (_E.id, _E.kind, _E.unit, _E.arm, _E.share, _E.status, _E.latency_ms, _E.value)
"""What `_Totals.fold` is told of an event"""


class Kept(Future[bool]):
    """Resolves once its event is on the disk. Whoever stops waiting for it does not stop the event."""

    def cancel(self) -> bool:
        return False

    def settle(self, new: bool | None, error: BaseException | None = None) -> None:
        """Resolve, whatever became of it meanwhile."""
        with suppress(InvalidStateError):
            if error is None:
                self.set_result(bool(new))
            else:
                self.set_exception(error)


Item = tuple[dict[str, Any], Kept]


class Events:
    """The log of one deployment. Any number of processes may write; each has its own writer thread."""

    def __init__(self, where: Path | str | None = None) -> None:
        """where: a sqlite file or a PostgreSQL's URL; by default what PATCHBAY_DB names, else a file of the home."""
        self.database = Database.of("events.db", where, timeout=BUSY_S, keep=True)
        self.database.create(_TABLES)
        self.lost: Counter[str] = Counter()
        """experiment -> exposures and outcomes of this process that could not be written"""
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._totals: dict[str, _Totals] = {}
        self._folding = threading.Lock()
        self._closed = threading.Event()
        self._moved = time.monotonic()
        self._reviving = threading.Lock()
        self._writer = self._revived()

    def expose(
        self, experiment: Experiment, unit: str, arm: Arm, *, request: str = "", status: int = 200,
        latency_ms: float | None = None,
    ) -> Kept:  # fmt: skip
        """A unit was answered (or failed) by an arm. The future resolves once it is durable."""
        return self._put(
            kind="exposure", experiment=experiment.name, unit=unit, arm=arm, digest=experiment.arm_digest(arm),
            share=experiment.share, request=request, status=status, latency_ms=latency_ms,
        )  # fmt: skip

    def outcome(
        self, experiment: Experiment, unit: str, value: float, *, arm: Arm | None = None, key: str | None = None
    ) -> Kept:
        """A unit's outcome (checked before: experiment.check_value). False if the key was seen already: counted once.

        arm: in shadow mode, whose answer it judges; in a split the unit's exposure says.
        """
        return self._put(kind="outcome", experiment=experiment.name, unit=unit, arm=arm, value=value, key=key)

    def drop(self, experiment: Experiment, unit: str) -> Kept:
        """A shadow answer that was given up under load."""
        return self._put(kind="drop", experiment=experiment.name, unit=unit)

    def arm_of(self, experiment: str, unit: str) -> Arm:
        """The arm a unit saw first. Raises NotFound for a unit that never saw any."""
        exposed = select(_E.arm).where(_E.experiment == experiment, _E.unit == unit, _E.kind == "exposure")
        with self._reading() as db:
            row = db.execute(exposed.order_by(_E.id).limit(1)).first()
        if row is None:
            raise NotFound(f"Unit {unit[:60]!r} was never answered in experiment {experiment}; send its request first.")
        arm: Arm = row[0]
        return arm

    def summary(self, experiment: Experiment) -> Summary:
        """Everything known, folding in what is new since the last time."""
        with self._folding:
            totals = self._totals.setdefault(experiment.name, _Totals())
            with self._reading() as db:
                for row in db.execute(_of(experiment).where(_E.id > totals.seen)):
                    totals.fold(experiment, *row)
            return totals.summary()

    def trajectory(self, experiment: Experiment, points: int = 100) -> list[Summary]:
        """The summaries one would have seen after every so many events; the last one is of all of them."""
        with self._reading() as db:
            rows = db.execute(_of(experiment)).all()
        totals, seen = _Totals(), []
        every = max(1, len(rows) // points)
        for n, row in enumerate(rows, 1):
            totals.fold(experiment, *row)
            if n % every == 0 or n == len(rows):
                seen.append(totals.summary())
        return seen

    def count(self) -> int:
        """Events on the disk."""
        with self._reading() as db:
            return int(db.execute(select(func.count()).select_from(EVENTS)).scalar_one())

    def problem(self) -> str:
        """Why nothing may be written now; empty if all is well."""
        if not self._writer.is_alive() and not self._closed.is_set():
            return "the writer of the event log has ended"
        if self._waiting.qsize() and (silent := time.monotonic() - self._moved) > HUNG_S:
            return f"the event log has taken nothing for {silent:.0f} s"
        return ""

    def close(self, timeout: float = CLOSE_S) -> None:
        """Write what waits, then stop the writer; it is left behind if that takes longer than `timeout` seconds."""
        self._closed.set()
        self._waiting.put(None)
        self._writer.join(timeout)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, **event: Any) -> Kept:
        future = Kept()
        event["at"] = time.time()
        item = ({c: event.get(c) for c in _COLUMNS}, future)
        if self._closed.is_set() or self._waiting.qsize() >= MAX_WAITING:
            self._give_up([item], NotReady("The event log takes no more events; try again in a few seconds."))
            return future
        self._waiting.put(item)
        if not self._writer.is_alive():
            with self._reviving:
                self._writer = self._writer if self._writer.is_alive() else self._revived()
        return future

    def _revived(self) -> threading.Thread:
        thread = threading.Thread(target=self._write, name="events", daemon=True)
        thread.start()
        return thread

    def _write(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch: list[Item] = [first]
            last = False
            while len(batch) < MAX_BATCH:
                try:
                    more = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    last = True
                    break
                batch.append(more)
            try:
                self._keep(batch)
            except BaseException as e:  # the next batch is other people's
                log.exception("the event log lost a batch")
                self._give_up(batch, e)
            self._moved = time.monotonic()
            if last:
                break
        self.database.close()

    def _keep(self, batch: list[Item]) -> None:
        """On the disk, or given up after GIVE_UP_S; an event that cannot be stored at all is given up alone."""
        start, pause = time.monotonic(), 0.02
        while True:
            try:
                written = self._commit([row for row, _ in batch])
            except (
                OperationalError,
                InterfaceError,
                TimeoutError,
            ) as e:  # locked, full, gone: the place, not the events
                self.database.close()
                if self._closed.is_set() or time.monotonic() - start > GIVE_UP_S:
                    log.error("the event log gives up %d events: %s", len(batch), e)
                    self._give_up(batch, NotReady("The event log cannot be written; it is in the log. Try again."))
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.5)
            except Exception as e:
                self.database.close()
                if len(batch) == 1:
                    log.exception("an event cannot be stored")
                    self._give_up(batch, e)
                    return
                for item in batch:
                    self._keep([item])
                return
            else:
                for (_, future), new in zip(batch, written, strict=True):
                    future.settle(new)
                return

    def _commit(self, rows: list[dict[str, Any]]) -> list[bool]:
        written: list[bool] = []
        with self.database.writing() as db:
            for keyed, some in itertools.groupby(rows, lambda row: row["key"] is not None):
                if keyed:  # one of a key that is there already is not written, and its caller is told so
                    written += [db.execute(_INSERT, row).rowcount == 1 for row in some]
                else:
                    many = list(some)
                    db.execute(_INSERT, many)
                    written += [True] * len(many)
        return written

    def _give_up(self, batch: list[Item], error: BaseException) -> None:
        for row, future in batch:
            if not future.done():
                self.lost[row["experiment"]] += 1
                future.settle(None, error)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A connection to read with. Raises NotReady for what goes wrong with the database."""
        try:
            with self.database.reading() as db:
                yield db
        except SQLAlchemyError as e:
            log.warning("the event log cannot be read: %s", e)
            raise NotReady("The event log cannot be read now; try again in a few seconds.") from None


def _of(experiment: Experiment) -> Select[Any]:
    """Its events in the order they were written."""
    return select(*_FOLDED).where(_E.experiment == experiment.name).order_by(_E.id)


@dataclass
class _Unit:
    """What one unit did."""

    arm: Arm
    counted: bool = True
    calls: int = 0
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
    owners: Counter[str] = field(default_factory=Counter)
    """tenant -> its units that count"""
    uncounted: int = 0
    low: float = math.inf
    high: float = -math.inf
    """outcomes so far"""

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
        owner, known = unit.rpartition(OWNER)[0], self.units.get(unit)
        if known is None and not self._admit(x, owner):
            self.units[unit] = _Unit(arm, counted=False)
            self.uncounted += 1
            return
        if known is not None and (not known.counted or (owner and known.calls >= UNIT_CALLS)):
            return  # one token's, or one unit's, however often it calls
        stats = self.arms[arm]
        self.arms[arm] = replace(stats, calls=stats.calls + 1, errors=stats.errors + (status >= 500 or status == 0))
        if known is not None:
            known.calls += 1
        if known is None:
            self.units[unit] = _Unit(arm, calls=1)
            self.arms[arm] = replace(self.arms[arm], units=stats.units + 1)
            if x.mode == "split":
                c, t = self.ratio.get(share, (0, 0))
                self.ratio[share] = (c, t + 1) if arm == TREATMENT else (c + 1, t)
        elif known.arm != arm and not known.crossed and x.mode == "split":
            known.crossed = True
            self.crossovers += 1
        if latency_ms is not None:
            self._latency(x, arm, latency_ms)

    def _admit(self, x: Experiment, owner: str) -> bool:
        """Whether one more unit of a tenant counts: it may have the first few, and then its share of all."""
        if owner:
            mine, whole = self.owners[owner] + 1, self.owners.total() + 1
            if x.token_share < 1.0 and mine > TOKEN_UNITS and mine > x.token_share * whole:
                return False
            self.owners[owner] += 1
        return True

    def _outcome(self, unit: str, arm: Arm | None, value: float) -> None:
        known = self.units.get(unit)
        if known is None or not known.counted:
            return  # a unit that never saw an arm says nothing about one
        self.low, self.high = min(self.low, value), max(self.high, value)
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
            len(self.owners), self.uncounted, self.low, self.high,
        )  # fmt: skip


def _add(s: ArmStats, n: int, total: float, squares: float) -> ArmStats:
    return replace(s, n=s.n + n, total=s.total + total, squares=s.squares + squares)
