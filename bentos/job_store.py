"""Durable storage of long-running jobs in one SQLite file: requests, checkpoints, events and results.

WAL with synchronous=FULL, and one writer thread that commits everything waiting in one transaction, like the event log
of experiments. A write's future resolves once it is on disk, so what was acknowledged survives kill -9. Each process
that works on jobs holds a file lock while it lives; a job whose holder's lock is free was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

State = Literal["queued", "running", "done", "failed", "cancelled", "lost"]
OPEN: tuple[State, ...] = ("queued", "running")
KEPT_EVENTS = 1000
"""Number of a job's newest events that are kept"""
MAX_BATCH = 512

_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, system TEXT NOT NULL, kind TEXT NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL,
  holder TEXT NOT NULL, created REAL NOT NULL, started REAL, finished REAL, stop INTEGER NOT NULL DEFAULT 0,
  ask TEXT, about TEXT NOT NULL, result TEXT, error TEXT
);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (system, owner, created);
CREATE TABLE IF NOT EXISTS kept (job TEXT NOT NULL, number INTEGER NOT NULL, data TEXT NOT NULL,
  PRIMARY KEY (job, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (job TEXT NOT NULL, number INTEGER NOT NULL, data TEXT NOT NULL,
  PRIMARY KEY (job, number)) WITHOUT ROWID;
"""
_COLUMNS = "id, kind, owner, state, holder, created, started, finished, ask, about, result, error"


@dataclass(frozen=True)
class Record:
    """A job as it is stored."""

    id: str
    kind: str
    owner: str
    """Hash of the bearer token that submitted it"""
    state: State
    holder: str
    """Name of the process that works on it"""
    created: float
    """Time of submission, in seconds since 1970; so are the next two"""
    started: float | None
    finished: float | None
    ask: Any
    """The request, as its kind of work reads it"""
    about: dict[str, Any]
    """Facts shown in the job's document"""
    result: Any
    error: dict[str, Any] | None


def _record(row: Sequence[Any]) -> Record:
    ask, about, result, error = (None if v is None else json.loads(v) for v in row[8:])
    id, kind, owner, state, holder, created, started, finished = row[:8]
    return Record(id, kind, owner, state, holder, created, started, finished, ask, about or {}, result, error)


class JobStore:
    """The jobs of one deployment. Any number of processes may share the file; each has its own writer thread."""

    def __init__(self, folder: Path, system: str) -> None:
        self.system, self.path = system, folder / "jobs.db"
        self._locks = folder / "jobs"
        self._locks.mkdir(parents=True, exist_ok=True)
        self.holder = secrets.token_hex(8)
        self._lock: IO[str] = (self._locks / self.holder).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with closing(self._open()) as db:
            db.executescript(_TABLES)
        self._waiting: queue.SimpleQueue[tuple[list[tuple[str, tuple[Any, ...]]], Future[int]] | None]
        self._waiting = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="jobs", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write what is queued, stop the writer, release the lock."""
        self._waiting.put(None)
        self._writer.join()
        self._lock.close()
        (self._locks / self.holder).unlink(missing_ok=True)

    # ---- writing: each returns a future of the number of rows changed, which resolves when the write is durable -----

    def add(self, id: str, kind: str, owner: str, ask: Any, about: dict[str, Any]) -> Future[int]:
        """Add a queued job, held by this process."""
        return self._put((
            "INSERT INTO jobs (id, system, kind, owner, state, holder, created, ask, about) VALUES (?,?,?,?,?,?,?,?,?)",
            (id, self.system, kind, owner, "queued", self.holder, time.time(), _text(ask), _text(about)),
        ))  # fmt: skip

    def begin(self, id: str) -> Future[int]:
        """Mark a queued job as running. Changes 0 rows if it was stopped before."""
        return self._put(("UPDATE jobs SET state='running', started=COALESCE(started, ?) "
                          "WHERE id=? AND holder=? AND stop=0", (time.time(), id, self.holder)))  # fmt: skip

    def finish(self, id: str, state: State, result: Any = None, error: dict[str, Any] | None = None) -> Future[int]:
        """Mark a job as ended. A done job's request and checkpoints are deleted, since they may be large."""
        done = state == "done"
        first = (
            f"UPDATE jobs SET state=?, finished=?, result=?, error=?{', ask=NULL' if done else ''} "
            "WHERE id=? AND holder=? AND state IN ('queued', 'running')",
            (state, time.time(), _text(result), _text(error), id, self.holder),
        )
        more = (("DELETE FROM kept WHERE job=?", (id,)),) if done else ()
        return self._put(first, *more)

    def ask_stop(self, id: str) -> Future[int]:
        """Request that a job stop; the process that holds it will stop it."""
        return self._put(("UPDATE jobs SET stop=1 WHERE id=? AND state IN ('queued', 'running')", (id,)))

    def take(self, was: Record, state: State) -> Future[int]:
        """Take over a job in the state `was` and set another state. Changes 0 rows if another process was first."""
        return self._put((
            "UPDATE jobs SET holder=?, state=?, finished=?, error=NULL, stop=0 WHERE id=? AND holder=? AND state=?",
            (self.holder, state, None if state == "queued" else time.time(), was.id, was.holder, was.state),
        ))  # fmt: skip

    def keep(self, id: str, number: int, data: Any) -> Future[int]:
        """Add a checkpoint."""
        return self._put(("INSERT OR REPLACE INTO kept VALUES (?,?,?)", (id, number, _text(data))))

    def tell(self, id: str, number: int, data: Any) -> Future[int]:
        """Add an event; events older than the newest KEPT_EVENTS are deleted."""
        return self._put(("INSERT OR REPLACE INTO events VALUES (?,?,?)", (id, number, _text(data))),
                         ("DELETE FROM events WHERE job=? AND number<=?", (id, number - KEPT_EVENTS)))  # fmt: skip

    def forget(self, *ids: str) -> Future[int]:
        """Delete jobs with everything stored about them."""
        tables = (("jobs", "id"), ("kept", "job"), ("events", "job"))
        return self._put(*((f"DELETE FROM {table} WHERE {key}=?", (id,)) for id in ids for table, key in tables))

    # ---- reading ---------------------------------------------------------------------------------------------------

    def get(self, id: str) -> Record | None:
        """Return a job; None if there is none of this id."""
        found = self._read(f"SELECT {_COLUMNS} FROM jobs WHERE id=? AND system=?", id, self.system)
        return _record(found[0]) if found else None

    def of(self, owner: str) -> list[Record]:
        """Return an owner's jobs, newest first, without their requests and results."""
        columns = _COLUMNS.replace("ask,", "NULL,").replace("result,", "NULL,")
        order = "ORDER BY created DESC, id"
        found = self._read(f"SELECT {columns} FROM jobs WHERE system=? AND owner=? {order}", self.system, owner)
        return [_record(row) for row in found]

    def unfinished(self) -> list[Record]:
        """Return the queued and running jobs of all processes, oldest first, without their requests."""
        columns = _COLUMNS.replace("ask,", "NULL,")
        found = self._read(
            f"SELECT {columns} FROM jobs WHERE system=? AND state IN ('queued', 'running') ORDER BY created, id",
            self.system,
        )
        return [_record(row) for row in found]

    def to_stop(self) -> list[str]:
        """Return the ids of jobs held here that were requested to stop."""
        return [row[0] for row in self._read(
            "SELECT id FROM jobs WHERE holder=? AND stop=1 AND state IN ('queued', 'running')", self.holder
        )]  # fmt: skip

    def kept(self, id: str) -> list[Any]:
        """Return a job's checkpoints, in order."""
        return [json.loads(r[0]) for r in self._read("SELECT data FROM kept WHERE job=? ORDER BY number", id)]

    def events(self, id: str, after: int = 0) -> list[tuple[int, Any]]:
        """Return a job's events with numbers above `after`, in order."""
        rows = self._read("SELECT number, data FROM events WHERE job=? AND number>? ORDER BY number", id, after)
        return [(n, json.loads(data)) for n, data in rows]

    def last_event(self, id: str) -> tuple[int, dict[str, Any]]:
        """Return the newest event with its number; (0, {}) if there is none."""
        rows = self._read("SELECT number, data FROM events WHERE job=? ORDER BY number DESC LIMIT 1", id)
        return (rows[0][0], json.loads(rows[0][1])) if rows else (0, {})

    def alive(self, holder: str) -> bool:
        """Return whether the process that holds jobs under this name is alive."""
        if holder == self.holder:
            return True
        try:
            with (self._locks / holder).open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        with contextlib.suppress(OSError):
            (self._locks / holder).unlink(missing_ok=True)
        return False

    # ---- the file --------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        return db

    def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with closing(self._open()) as db:
            return db.execute(sql, values).fetchall()

    def _put(self, *statements: tuple[str, tuple[Any, ...]]) -> Future[int]:
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()  # so that cancelling the waiting caller does not cancel the write
        self._waiting.put((list(statements), future))
        return future

    def _write(self) -> None:
        with closing(self._open()) as db:
            while (first := self._waiting.get()) is not None:
                batch, last = [first], False
                while len(batch) < MAX_BATCH and not last:
                    try:
                        more = self._waiting.get_nowait()
                    except queue.Empty:
                        break
                    if more is None:
                        last = True
                    else:
                        batch.append(more)
                self._commit(db, batch)
                if last:
                    return

    @staticmethod
    def _commit(
        db: sqlite3.Connection, batch: list[tuple[list[tuple[str, tuple[Any, ...]]], Future[int]]]
    ) -> None:  # fmt: skip
        try:
            db.execute("BEGIN IMMEDIATE")
            changed = [sum([db.execute(sql, values).rowcount for sql, values in one][:1]) for one, _ in batch]
            db.execute("COMMIT")
        except sqlite3.Error as e:
            if db.in_transaction:
                db.execute("ROLLBACK")
            for _, future in batch:
                future.set_exception(e)
            return
        for (_, future), n in zip(batch, changed, strict=True):
            future.set_result(n)


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, separators=(",", ":"), allow_nan=False)
