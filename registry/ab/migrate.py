"""Copy a home's ledger and events into a PostgreSQL, without loss: `python -m registry.ab.migrate URL`.

Entries keep their hashes, so the chain that was verified before is verified again where it lies now; events keep their
numbers. The files stay as they are. Stop the services first: what they write meanwhile is not copied.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import Connection, Table, func, select, text

from registry.ab.database import Database
from registry.ab.events import EVENTS, Events
from registry.ab.ledger import ENTRIES, Ledger
from registry.errors import Conflict, Invalid, NotFound, PatchbayError, Tampered
from registry.home import home

BATCH = 5000
"""rows in memory at once"""


def migrate(to: str, folder: Path | None = None) -> dict[str, int]:
    """Copy both logs of a home (`folder`) into the database at the URL `to`; table -> rows copied.

    Raises NotFound if there is nothing to copy, Tampered if the ledger's chain does not hold here or there, Conflict if
    the database holds other entries or events.
    """
    folder = folder or home()
    files = {"entries": folder / "ledger.db", "events": folder / "events.db"}
    if not any(file.is_file() for file in files.values()):
        raise NotFound(f"{folder} has neither ledger.db nor events.db. Name the home: PATCHBAY_HOME=FOLDER")
    target = Database(to)
    if not target.shared:
        raise Invalid(f"{str(target)[:80]!r} is no PostgreSQL; to move sqlite files, copy them.")
    copied = {}
    book = Ledger(to)
    Events(to).close()
    if files["entries"].is_file():
        Ledger(files["entries"]).verify()
    for table in (ENTRIES, EVENTS):
        file = files[table.name]
        copied[table.name] = _copy(table, Database(file), target) if file.is_file() else 0
    book.verify()
    return copied


def _copy(table: Table, source: Database, target: Database) -> int:
    """Every row in order, in one transaction. Raises Conflict if the target is not empty."""
    key, n = next(iter(table.primary_key)), 0
    with source.reading() as old, target.writing() as new:
        new.execute(text("SET LOCAL statement_timeout = 0"))
        if there := _count(new, table):
            raise Conflict(f"{target} has {there} {table.name} already; migrate into an empty database.")
        rows = old.execution_options(yield_per=BATCH).execute(select(table).order_by(key)).mappings()
        for part in rows.partitions(BATCH):
            new.execute(table.insert(), [dict(row) for row in part])
            n += len(part)
        if n != _count(new, table):
            raise Tampered(f"{n} {table.name} were read and {_count(new, table)} arrived; nothing was kept.")
        if key.autoincrement is not False and n:
            new.execute(text(f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key.name}'), MAX({key.name})) "
                             f"FROM {table.name}"))  # fmt: skip
    return n


def _count(db: Connection, table: Table) -> int:
    return int(db.execute(select(func.count()).select_from(table)).scalar_one())


def main(words: list[str] | None = None) -> int:
    """Copy the logs of PATCHBAY_HOME and say how many rows there were."""
    given = sys.argv[1:] if words is None else words
    if len(given) != 1 or given[0].startswith("-"):
        print("usage: python -m registry.ab.migrate postgresql://user:password@host/name", file=sys.stderr)
        return 2
    try:
        copied = migrate(given[0])
    except PatchbayError as e:
        print(e, file=sys.stderr)
        return 1
    print(f"{copied['entries']} entries and {copied['events']} events copied; now set PATCHBAY_DB to that database.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
