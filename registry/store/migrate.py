"""Copy a home's MLflow into another database and file store, without loss: `python -m registry.store.migrate`.

From the embedded default (sqlite and a folder of the home) to what `patchbay up` runs on: the tables into PATCHBAY_DB,
row by row with their numbers, so that runs, versions and addresses stay what they are; the files into PATCHBAY_STORE,
or else they stay where they are; and every sealed folder into PATCHBAY_STORE by its digest. Locations become MLflow's
own (`mlflow-artifacts:/...`), which its server hands through. The old files stay as they are. Stop what writes to them
first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.db.base_sql_model import Base
from mlflow.store.model_registry.dbmodels import models as _registry_tables
from mlflow.store.tracking.dbmodels import models as _tracking_tables
from sqlalchemy import Connection, Engine, Table, create_engine, func, inspect, select, text

from registry import bucket, manifest
from registry.ab.database import ENV, driven
from registry.errors import BadArtifact, Conflict, Invalid, NotFound, PatchbayError, Tampered
from registry.home import home

del _registry_tables, _tracking_tables  # imported for the tables they declare
BATCH = 2000
"""rows in memory at once"""
PLACES = {
    "experiments": ("artifact_location",), "runs": ("artifact_uri",), "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}  # fmt: skip
"""table -> columns that say where files lie"""
GIVEN = {"experiments": 1, "workspaces": 1}
"""rows of a database that MLflow has only just made"""
FILES = "mlartifacts"


def migrate(to: str, folder: Path | None = None) -> dict[str, int]:
    """Copy the MLflow of a home (`folder`) to the PostgreSQL at `to`, and its files to the bucket; what -> how many.

    Raises NotFound if there is none, Conflict if the database holds runs already, Tampered if fewer rows arrive.
    """
    folder = folder or home()
    file = folder / "mlflow.db"
    if not file.is_file():
        raise NotFound(f"{folder} has no mlflow.db. Name the home: PATCHBAY_HOME=FOLDER")
    if not driven(to).startswith("postgresql"):
        raise Invalid("The target is no PostgreSQL; to move sqlite files, copy them.")
    _made(f"sqlite:///{file}")  # brings its tables to this MLflow's schema
    _made(driven(to))
    old, new = create_engine(f"sqlite:///{file}"), create_engine(driven(to))
    try:
        copied = _tables(old, new, (folder / FILES).as_uri())
    finally:
        old.dispose()
        new.dispose()
    return {**copied, **_files(folder)}


def _made(uri: str) -> None:
    MlflowClient(uri).search_experiments(max_results=1)


def _tables(old: Engine, new: Engine, files: str) -> dict[str, int]:
    """Every row, in one transaction."""
    tables = [t for t in Base.metadata.sorted_tables if inspect(old).has_table(t.name)]
    rows = 0
    with old.connect() as source, new.begin() as target:
        for table in tables:
            if (there := _count(target, table)) > GIVEN.get(table.name, 0):
                raise Conflict(f"The database has {there} {table.name} already; migrate into an empty one.")
        for table in reversed(tables):
            target.execute(table.delete())
        for table in tables:
            n = 0
            found = source.execution_options(yield_per=BATCH).execute(select(table)).mappings()
            for part in found.partitions(BATCH):
                target.execute(table.insert(), [_placed(table.name, row, files) for row in part])
                n += len(part)
            if n != _count(target, table):
                raise Tampered(f"{n} {table.name} were read and {_count(target, table)} arrived; nothing was kept.")
            _count_on(target, table)
            rows += n
        runs = _count(target, Base.metadata.tables["runs"])
        return {"rows": rows, "runs": runs, "versions": _count(target, Base.metadata.tables["model_versions"])}


def _placed(table: str, row: Mapping[Any, Any], files: str) -> dict[str, Any]:
    """A row whose files' places are the server's own."""
    out: dict[str, Any] = {str(k): v for k, v in row.items()}
    for column in PLACES.get(table, ()):
        where = out.get(column)
        if isinstance(where, str) and where.startswith(files):
            out[column] = f"mlflow-artifacts:{where[len(files) :]}"
    return out


def _count_on(target: Connection, table: Table) -> None:
    """Numbers that the database gives itself go on after those that were copied."""
    column = table.autoincrement_column
    if column is None:
        return
    asked = text("SELECT pg_get_serial_sequence(:table, :column)")
    sequence = target.execute(asked, {"table": table.name, "column": column.name}).scalar()
    most = target.execute(select(func.max(column))).scalar()
    if sequence and most:
        target.execute(text("SELECT setval(:sequence, :most)"), {"sequence": sequence, "most": most})


def _count(db: Connection, table: Table) -> int:
    return int(db.execute(select(func.count()).select_from(table)).scalar_one())


def _files(folder: Path) -> dict[str, int]:
    """MLflow's files and the sealed folders, into the bucket if there is one."""
    at = bucket.address()
    if at is None:
        return {"files": 0, "artifacts": 0}
    files = [f for f in (folder / FILES).rglob("*") if f.is_file()]
    if files:
        get_artifact_repository(f"{at}mlflow").log_artifacts(str(folder / FILES))
    sealed = 0
    for one in sorted((folder / "artifacts").glob("*")):
        if manifest.is_digest(one.name):
            try:
                bucket.put(one, one.name)
            except BadArtifact as e:
                raise type(e)(f"{e} Pull it again, then migrate again.") from None
            sealed += 1
    return {"files": len(files), "artifacts": sealed}


def main() -> int:
    """Copy the MLflow of PATCHBAY_HOME to what PATCHBAY_DB and PATCHBAY_STORE name, and say how much it was."""
    to = os.environ.get(ENV)
    if not to or sys.argv[1:]:
        sys.stderr.write(
            "usage: PATCHBAY_DB=postgresql://... [PATCHBAY_STORE=s3://...] python -m registry.store.migrate\n"
        )
        return 2
    try:
        copied = migrate(to)
    except PatchbayError as e:
        sys.stderr.write(f"{e}\n")
        return 1
    sys.stdout.write(", ".join(f"{n} {what}" for what, n in copied.items()) + " copied; now: patchbay up SYSTEM\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
