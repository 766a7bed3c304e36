"""Where ledger and events lie: sqlite files of one machine, or the PostgreSQL that all replicas share.

`PATCHBAY_DB` names a PostgreSQL by SQLAlchemy's URL, `postgresql://user:password@host/name`; without it each log is a
file of the home. Both keep what a commit returned: sqlite in WAL with synchronous=FULL, PostgreSQL as it comes. Both
have one writer at a time (BEGIN IMMEDIATE; an advisory lock), so numbers grow in the order of commits and a reader that
has seen number n never finds a smaller new one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.schema import CreateIndex, CreateTable

from registry.errors import ConfigError, NotReady
from registry.home import home

ENV = "PATCHBAY_DB"
EXTRA = "pip install 'patchbay[postgres]'"

_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER IF NOT EXISTS no_{verb} BEFORE {VERB} ON {table} BEGIN SELECT RAISE(ABORT, 'append only'); END",
    ),
    "postgresql": (
        "CREATE OR REPLACE FUNCTION patchbay_append_only() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'append only'; END $$ LANGUAGE plpgsql",
        "CREATE OR REPLACE TRIGGER no_{verb} BEFORE {VERB} ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION patchbay_append_only()",
    ),
}


class Database:
    """One append-only log's tables, wherever they lie."""

    def __init__(self, where: Path | str, timeout: float = 5.0, keep: bool = False) -> None:
        """where: a sqlite file, or the URL of a PostgreSQL. timeout: seconds to wait for another writer. keep: a file
        stays open between uses, until `close`; else it is opened anew for each."""
        self.url = _url(where)
        self.shared = self.url.get_backend_name() == "postgresql"
        """whether other machines may write here, too"""
        self._engine = _postgres(self.url, timeout) if self.shared else _sqlite(self.url, timeout, keep)

    @classmethod
    def of(cls, file: str, where: Path | str | None = None, timeout: float = 5.0, keep: bool = False) -> Database:
        """The database of a log: `where`, else what PATCHBAY_DB names, else a file of the home."""
        return cls(where or os.environ.get(ENV) or home() / file, timeout, keep)

    def __str__(self) -> str:
        """Where it is, without a password."""
        return self.url.render_as_string(hide_password=True) if self.shared else str(self.url.database)

    def create(self, tables: MetaData) -> None:
        """Make the tables and their guards against changes, if they are missing."""
        # of a file, every statement is a transaction that does nothing, and asks for no lock, where all is there
        with self.writing() if self.shared else self.reading() as db:
            if self.shared and all(inspect(db).has_table(t.name) for t in tables.sorted_tables):
                return
            for table in tables.sorted_tables:
                db.execute(CreateTable(table, if_not_exists=True))
                for index in sorted(table.indexes, key=lambda i: str(i.name)):
                    db.execute(CreateIndex(index, if_not_exists=True))
                for verb in ("update", "delete"):
                    for statement in _APPEND_ONLY[self.url.get_backend_name()]:
                        db.exec_driver_sql(statement.format(verb=verb, VERB=verb.upper(), table=table.name))

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read with; raises SQLAlchemyError for what goes wrong there."""
        with self._engine.connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction of the only writer there is, in any process; committed at the end, undone by an exception."""
        with self._engine.connect() as db:
            if self.shared:
                db.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key("patchbay")})
            else:
                db.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                with suppress(SQLAlchemyError):
                    self._end(db, "ROLLBACK")
                raise
            self._end(db, "COMMIT")

    def _end(self, db: Connection, how: str) -> None:
        if self.shared:
            db.commit() if how == "COMMIT" else db.rollback()
        else:
            db.exec_driver_sql(how)

    def turn(self, name: str) -> Turn:
        """A role that one process of a deployment has at a time."""
        return SharedTurn(self._engine, name) if self.shared else Turn(name)

    def close(self) -> None:
        """Let go of open connections; what comes next opens others."""
        self._engine.dispose()


def _url(where: Path | str) -> URL:
    if isinstance(where, Path) or "://" not in where:
        return URL.create("sqlite", database=str(where))
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{ENV} is no database URL. Write postgresql://user:password@host:5432/name.") from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"{ENV} names {url.get_backend_name()!r}; ledger and events lie in sqlite or postgresql.")
    if url.get_backend_name() == "postgresql" and url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    return url


def driven(where: str) -> str:
    """A database's URL as other libraries take it, with its driver and password."""
    return _url(where).render_as_string(hide_password=False)


def _sqlite(url: URL, timeout: float, keep: bool) -> Engine:
    pool = QueuePool if keep else NullPool
    engine = create_engine(url, poolclass=pool, connect_args={"timeout": timeout, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _(db: Any, _: Any) -> None:
        db.isolation_level = None  # transactions are begun where they are needed, and IMMEDIATE
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")

    return engine


def _postgres(url: URL, timeout: float) -> Engine:
    milliseconds = int(timeout * 1000)
    try:
        return create_engine(
            url, pool_pre_ping=True, pool_size=2, max_overflow=8, pool_timeout=timeout,
            connect_args={
                "connect_timeout": max(2, int(timeout)), "application_name": f"patchbay {os.getpid()}",
                "options": f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds}",
            },
        )  # fmt: skip
    except ModuleNotFoundError:
        raise ConfigError(f"{ENV} names a PostgreSQL and its driver is not installed: {EXTRA}") from None


def reason(e: SQLAlchemyError) -> str:
    """What the driver says went wrong, in a line."""
    lines = str(getattr(e, "orig", None) or e).strip().splitlines()
    return lines[0][:200] if lines else type(e).__name__


def _key(name: str) -> int:
    """A number for an advisory lock: the same for a name on every machine."""
    return zlib.crc32(name.encode()) | 1 << 32


class Turn:
    """A role that one process of this machine has at a time, by a lock on a file of the home that says who has it."""

    def __init__(self, name: str) -> None:
        self.holder = ""
        """who has it, if somebody else does"""
        self._file = (home() / f"{name}.lock").open("a+")
        self._mine = False

    def mine(self) -> bool:
        """Whether this process has the role; takes it if it is free."""
        if not self._mine:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.seek(0)
                self.holder = f"process {self._file.read(80).strip() or 'unknown'}"
                return False
            self._mine, self.holder = True, ""
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        return True

    def close(self) -> None:
        """Give the role up."""
        self._file.close()


class SharedTurn(Turn):
    """A role that one process of a deployment has at a time, on whatever machine: an advisory lock of a session, which
    PostgreSQL lets go when the session's process dies or its network does."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.holder = ""
        self._engine, self._key = engine, _key(name)
        self._session: Connection | None = None

    def mine(self) -> bool:
        """Whether this process has the role; takes it if it is free. Raises NotReady if the database is away."""
        try:
            if self._session is not None:
                self._session.execute(text("SELECT 1"))  # a session that ended has let the lock go
                return True
            session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if session.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}).scalar():
                self._session, self.holder = session, ""
                return True
            self.holder = self._who(session)
            session.close()
        except SQLAlchemyError as e:
            self.close()
            raise NotReady(f"The database cannot be asked whose turn it is: {reason(e)}") from None
        return False

    def _who(self, session: Connection) -> str:
        found = session.execute(
            text(
                "SELECT a.application_name, COALESCE(host(a.client_addr), 'this machine') FROM pg_locks l "
                "JOIN pg_stat_activity a USING (pid) WHERE l.locktype = 'advisory' AND l.objsubid = 1 "
                "AND l.granted AND l.classid = :high AND l.objid = :low"
            ),
            {"high": self._key >> 32, "low": self._key & 0xFFFFFFFF},
        ).first()
        return f"{found[0]} on {found[1]}" if found else "process unknown"

    def close(self) -> None:
        """Give the role up."""
        if self._session is not None:
            with suppress(SQLAlchemyError):
                self._session.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": self._key})
            with suppress(SQLAlchemyError):
                self._session.invalidate()  # a pool must not keep what may still have the lock
                self._session.close()
            self._session = None
