"""Ledger and events on both of their databases."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine

from registry.ab.database import _url

BOTH = ("sqlite", "postgresql")


def meddle(where, *statements):
    """Change a database behind the log's back; triggers are dropped first if that is asked for."""
    engine = create_engine(_url(str(where)))
    with engine.connect() as db:
        for statement in statements:
            if statement.startswith("DROP TRIGGER") and engine.dialect.name == "postgresql":
                statement += " ON entries"
            db.exec_driver_sql(statement)
        db.commit()
    engine.dispose()


@pytest.fixture(params=BOTH)
def where(request, tmp_path):
    """where(name) -> a place for a log of that name: a file, or a fresh database of a real PostgreSQL."""
    if request.param == "sqlite":
        return lambda name: tmp_path / name
    server = request.getfixturevalue("postgres")
    made = {}

    def place(name):
        return made.setdefault(name, server.database())

    return place
