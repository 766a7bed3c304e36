"""The ledger: who is champion, who challenges, which experiment runs, since when and why.

Append-only, one hash chain per system, compare-and-set on the hash of the entry one has read: of two who promote at
once, one wins and the other gets a Conflict. MLflow's aliases only show what stands here; rollback and "what was live
at time T" are read from here. An entry that was returned is on the disk (registry/ab/database.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import (
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    UniqueConstraint,
    func,
    select,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from registry.ab.database import Database, reason
from registry.errors import Conflict, NotFound, NotReady, Tampered
from registry.manifest import canonical, digest_of, is_digest

Action = Literal["challenge", "gate", "sign", "split", "ramp", "promote", "rollback", "stop"]
BASE = "base"
"""the unpatched base, as champion or as an arm"""

_TABLES = MetaData()
ENTRIES = Table(
    "entries", _TABLES,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False), Column("who", Text, nullable=False), Column("system", Text, nullable=False),
    Column("action", Text, nullable=False), Column("champion", Text, nullable=False), Column("challenger", Text),
    Column("experiment", Text), Column("evidence", Text), Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
    UniqueConstraint("system", "previous"),
    Index("by_system", "system", "seq"),
)  # fmt: skip
_E = ENTRIES.c


@dataclass(frozen=True)
class Entry:
    """One decision, and the state after it."""

    seq: int
    at: float
    """unix seconds"""
    who: str
    system: str
    action: Action
    champion: str
    """digest, or "base" """
    challenger: str | None
    experiment: dict[str, Any] | None
    """the live experiment after this entry"""
    evidence: dict[str, Any] | None
    """why: the numbers that decided"""
    previous: str
    """hash of the entry before, "" for the first"""
    hash: str


class Ledger:
    """The ledger of one deployment; any number of processes may read and append."""

    def __init__(self, where: Path | str | None = None) -> None:
        """where: a sqlite file or a PostgreSQL's URL; by default what PATCHBAY_DB names, else a file of the home."""
        self._sound: dict[str, tuple[int, str]] = {}
        """system -> number and hash of the last entry whose chain was recomputed here"""
        self.database = Database.of("ledger.db", where)
        with self._guarded():
            self.database.create(_TABLES)

    def head(self, system: str) -> Entry | None:
        """The newest entry: what holds now. None for a system nobody decided on: its champion is the base."""
        return next(iter(self.history(system, 1)), None)

    def history(self, system: str, limit: int = 100, actions: Sequence[Action] = ()) -> list[Entry]:
        """Newest first; of `actions` alone, if any are named."""
        found = select(ENTRIES).where(_E.system == system).order_by(_E.seq.desc()).limit(limit)
        return self._read(found.where(_E.action.in_(actions)) if actions else found)

    def live_at(self, system: str, at: float) -> Entry | None:
        """What held at unix time `at`; None before the first entry."""
        found = select(ENTRIES).where(_E.system == system, _E.at <= at).order_by(_E.seq.desc()).limit(1)
        return next(iter(self._read(found)), None)

    def version(self) -> int:
        """Grows with every entry of any system; cheap, so that a service may ask often."""
        with self._guarded(), self.database.reading() as db:
            return _last(db)

    def gate(self, system: str, digest: str) -> dict[str, Any] | None:
        """What the newest gate said of an artifact (`registry.gate.Gated.evidence`); None if it was never gated."""
        named = f'"digest":{canonical(digest).decode()}'  # as evidence is written, so that others' gates are not read
        gates = select(ENTRIES).where(
            _E.system == system, _E.action == "gate", _E.evidence.contains(named, autoescape=True)
        )
        said = (e.evidence["gate"] for e in self._read(gates.order_by(_E.seq.desc())) if e.evidence)
        return next((gate for gate in said if gate.get("digest") == digest), None)

    def append(
        self,
        system: str,
        action: Action,
        *,
        expect: str,
        champion: str,
        challenger: str | None,
        experiment: dict[str, Any] | None = None,
        evidence: dict[str, Any] | None = None,
        who: str = "unknown",
    ) -> Entry:
        """One more entry, if the head's hash is still `expect` ("" for none). Raises Conflict if it is not."""
        for digest in (champion, challenger):
            if digest is not None and digest != BASE and not is_digest(digest):
                raise NotFound(f"{str(digest)[:80]!r} is neither a digest nor {BASE!r}; resolve the reference first.")
        newest = select(_E.hash, _E.at).where(_E.system == system).order_by(_E.seq.desc()).limit(1)
        with self._guarded(), self.database.writing() as db:
            row = db.execute(newest).first()
            head, before = row or ("", 0.0)
            if head != expect:
                raise _conflict(system, head, expect)
            body = {
                "seq": _last(db) + 1,
                "at": max(time.time(), before),  # a clock that steps back must not reorder what was live when
                "who": who,
                "system": system,
                "action": action,
                "champion": champion,
                "challenger": challenger,
                "experiment": experiment,
                "evidence": evidence,
                "previous": head,
            }
            entry = Entry(**body, hash=digest_of(body))  # type: ignore[arg-type]
            try:
                db.execute(ENTRIES.insert(), _row(entry))
            except IntegrityError:  # a writer that does not ask for the lock
                raise _conflict(system, "", expect) from None
        return entry

    def verify(self, system: str | None = None) -> int:
        """Entries whose chain was recomputed. Raises Tampered naming the first that does not hold."""
        last: dict[str, str] = {}
        found = select(ENTRIES).order_by(_E.seq)
        entries = self._read(found if system is None else found.where(_E.system == system))
        for e in entries:
            if e.previous != last.get(e.system, "") or _hash(e) != e.hash:
                raise Tampered(f"Entry {e.seq} of {self.database} ({e.system}, {e.action}) is not what was written.")
            last[e.system] = e.hash
        return len(entries)

    def sound(self, system: str) -> Entry | None:
        """The head, after recomputing the chain of what is new since the last time. Raises Tampered as `verify`."""
        seq, last = self._sound.get(system, (0, ""))
        head = None
        for e in self._read(select(ENTRIES).where(_E.system == system, _E.seq >= seq).order_by(_E.seq)):
            if (e.seq == seq and e.hash != last) or (e.seq > seq and e.previous != last) or _hash(e) != e.hash:
                raise Tampered(f"Entry {e.seq} of {self.database} ({e.system}, {e.action}) is not what was written.")
            seq, last, head = e.seq, e.hash, e
        if head is None and seq:
            raise Tampered(f"Entries of {self.database} ({system}) are gone. Restore the ledger.")
        self._sound[system] = (seq, last)
        return head

    def _read(self, found: Select[Any]) -> list[Entry]:
        with self._guarded(), self.database.reading() as db:
            rows = db.execute(found).all()
        try:
            return [_entry(row) for row in rows]
        except (ValueError, TypeError) as e:
            raise Tampered(f"An entry of {self.database} cannot be read ({e}). Restore the ledger.") from None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Raises NotReady for what goes wrong with the database."""
        try:
            yield
        except SQLAlchemyError as e:
            raise NotReady(
                f"The ledger {self.database} cannot be used: {reason(e)}. Try again, or look who has it open."
            ) from None


def _last(db: Connection) -> int:
    return int(db.execute(select(func.coalesce(func.max(_E.seq), 0))).scalar_one())


def _conflict(system: str, head: str, expect: str) -> Conflict:
    return Conflict(
        f"{system}: somebody else decided first (the ledger is at {head[:12] or 'its start'}, you read "
        f"{expect[:12] or 'an empty one'}). Look again with `patchbay show {system}`, then decide again."
    )


def _hash(e: Entry) -> str:
    return digest_of({k: v for k, v in asdict(e).items() if k != "hash"})


def _row(e: Entry) -> dict[str, Any]:
    said = {k: canonical(v).decode() for k, v in asdict(e).items() if k in _JSON and v is not None}
    return {**asdict(e), **dict.fromkeys(_JSON), **said}


def _entry(row: Row[Any]) -> Entry:
    values = dict(row._mapping)
    return Entry(**{k: json.loads(v) if k in _JSON and v is not None else v for k, v in values.items()})


_JSON = ("experiment", "evidence")


# ---- the decisions ---------------------------------------------------------------------------------------------


def challenge(
    ledger: Ledger, system: str, digest: str, *, evidence: dict[str, Any] | None = None, who: str = "unknown"
) -> Entry:
    """Name the challenger. The champion stays; a live experiment with another treatment stops."""
    head = ledger.head(system)
    live = head.experiment if head else None
    if live is not None and live["treatment"] != digest:
        live = None
    return _next(ledger, system, head, "challenge", challenger=digest, experiment=live, evidence=evidence, who=who)


def gate(ledger: Ledger, system: str, evidence: dict[str, Any], *, who: str = "unknown") -> Entry:
    """Write down what a gate said (`registry.gate.Gated.evidence`); who is champion, who challenges stays."""
    head = ledger.head(system)
    return _next(ledger, system, head, "gate", experiment=head.experiment if head else None, evidence=evidence, who=who)


def signed(ledger: Ledger, system: str, evidence: dict[str, Any], *, who: str = "unknown") -> Entry:
    """Write down that somebody signed an artifact: evidence["signature"] has digest, bundle and key; roles stay."""
    head = ledger.head(system)
    return _next(ledger, system, head, "sign", experiment=head.experiment if head else None, evidence=evidence, who=who)


def check_gate(ledger: Ledger, system: str, digest: str) -> None:
    """Raises Conflict for an artifact whose newest gate did not pass, or that has none. The base needs none."""
    if digest == BASE:
        return
    found = ledger.gate(system, digest)
    if found is not None and found["status"] == "passed":
        return
    broken = [p["says"] for p in found["promises"] if not p["kept"]] if found else []
    why = f"did not pass its gate ({'; '.join(broken)[:300]})" if found else "has not been through its gate"
    raise Conflict(
        f"sha256:{digest[:16]} of {system} {why}. Measure what it promises: patchbay gate sha256:{digest[:16]}; or say "
        "why it should go all the same: --force REASON"
    )


def split(
    ledger: Ledger, system: str, experiment: dict[str, Any], *, evidence: dict[str, Any] | None = None,
    who: str = "unknown",
) -> Entry:  # fmt: skip
    """Begin an experiment (plain JSON). Its control must be the champion. Raises Conflict if another one runs."""
    head = ledger.head(system)
    if head and head.experiment:
        raise Conflict(
            f"{system} already runs experiment {head.experiment['name']}. Stop it first: patchbay split {system} 0"
        )
    champion = head.champion if head else BASE
    if experiment["control"] != champion:
        raise Conflict(f"The control of {experiment['name']} is not the champion ({champion[:16]}).")
    return _next(
        ledger, system, head, "split", challenger=experiment["treatment"], experiment=experiment, evidence=evidence,
        who=who,
    )  # fmt: skip


def ramp(ledger: Ledger, system: str, share: float, *, who: str = "unknown") -> Entry:
    """A larger share of units; nobody who has the treatment loses it. Raises Conflict for a smaller one."""
    head = _live(ledger, system)
    assert head.experiment is not None
    if share < head.experiment["share"]:
        raise Conflict(
            f"The share is {head.experiment['share']:g}; lowering it to {share:g} would take the treatment from units "
            f"that have it. Stop the experiment instead: patchbay split {system} 0"
        )
    return _next(ledger, system, head, "ramp", experiment={**head.experiment, "share": share}, who=who)


def stop(ledger: Ledger, system: str, *, evidence: dict[str, Any] | None = None, who: str = "unknown") -> Entry:
    """End the experiment; everyone gets the champion."""
    return _next(ledger, system, _live(ledger, system), "stop", experiment=None, evidence=evidence, who=who)


def promote(
    ledger: Ledger, system: str, digest: str | None = None, *, evidence: dict[str, Any] | None = None,
    who: str = "unknown", expect: str | None = None,
) -> Entry:  # fmt: skip
    """Make `digest` (default: the challenger) the champion; experiments end. expect: hash of the head one judged."""
    head = ledger.head(system)
    digest = digest or (head.challenger if head else None)
    if digest is None:
        raise NotFound(f"{system} has no challenger to promote. Push one: patchbay push FOLDER")
    return _next(
        ledger, system, head, "promote", champion=digest, challenger=None, experiment=None, evidence=evidence, who=who,
        expect=expect,
    )  # fmt: skip


def rollback(
    ledger: Ledger, system: str, *, evidence: dict[str, Any] | None = None, who: str = "unknown",
    expect: str | None = None,
) -> Entry:  # fmt: skip
    """Undo the last step that put something before users: a running experiment, else the last promotion.

    Raises NotFound if nothing was ever promoted or tried.
    """
    head = ledger.head(system)
    if head and head.experiment:
        return _next(
            ledger,
            system,
            head,
            "rollback",
            challenger=None,
            experiment=None,
            evidence=evidence,
            who=who,
            expect=expect,
        )
    champion = _before(ledger, system)
    if champion is None:
        raise NotFound(f"{system} has nothing to roll back to: nothing was promoted.")
    return _next(
        ledger, system, head, "rollback", champion=champion, challenger=None, experiment=None, evidence=evidence,
        who=who, expect=expect,
    )  # fmt: skip


def _before(ledger: Ledger, system: str) -> str | None:
    """The champion before the present one, promotions that were rolled back already left out."""
    stack: list[str] = [BASE]
    for e in reversed(ledger.history(system, 1_000_000, ("promote", "rollback"))):
        if e.action == "promote" and e.champion != stack[-1]:
            stack.append(e.champion)
        elif e.action == "rollback" and e.champion != stack[-1]:
            stack.pop()
    return stack[-2] if len(stack) > 1 else None


def _live(ledger: Ledger, system: str) -> Entry:
    head = ledger.head(system)
    if head is None or head.experiment is None:
        raise NotFound(f"{system} runs no experiment. Begin one: patchbay split {system} REF 0.1")
    return head


_SAME: Any = object()


def _next(
    ledger: Ledger, system: str, head: Entry | None, action: Action, *, champion: str | None = None,
    challenger: Any = _SAME, experiment: dict[str, Any] | None, evidence: dict[str, Any] | None = None, who: str,
    expect: str | None = None,
) -> Entry:  # fmt: skip
    return ledger.append(
        system,
        action,
        expect=expect if expect is not None else (head.hash if head else ""),
        champion=champion or (head.champion if head else BASE),
        challenger=cast("str | None", (head.challenger if head else None) if challenger is _SAME else challenger),
        experiment=experiment,
        evidence=evidence,
        who=who,
    )
