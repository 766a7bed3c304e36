"""`python -m tests.drill --short|--night [--seed N] [--write] [--only WORD] [--keep FILE]`: docs/DRILL.md.

Exit status 1 if anything broke. The short form takes a minute or two on two idle cores, the long one a quarter of an
hour.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import sys
import tempfile
import time

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if "BENTOML_HOME" not in os.environ:  # read once per process; never the user's own
    os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="drill-bentos-")
    atexit.register(shutil.rmtree, os.environ["BENTOML_HOME"], ignore_errors=True)

import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from tests.drill import attacks, bentos, replicas, storage
from tests.drill.place import own_home
from tests.drill.table import PAGE, Row, page


def main() -> int:
    """Run them one after another, each in a home of its own."""
    words = argparse.ArgumentParser(prog="python -m tests.drill")
    words.add_argument("--night", action="store_true")
    words.add_argument("--short", action="store_true")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--write", action="store_true")
    words.add_argument("--only", default="")
    words.add_argument("--keep", type=Path, help="rows go there; those that are there are not tried again")
    args = words.parse_args()
    warnings.simplefilter("ignore")
    for name in ("patchbay", "mlflow", "sqlalchemy", "multipart.multipart", "python_multipart.multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is attacked says so in every line
    rows: list[Row] = []
    lines = args.keep.read_text().splitlines() if args.keep and args.keep.exists() else []
    kept = {name: Row(**row) for name, row in map(json.loads, lines)}
    # MLflow keeps connections to the stores a process has had; one for all homes, and it outlives them
    shown = tempfile.mkdtemp(prefix="drill-mlflow-")
    atexit.register(shutil.rmtree, shown, ignore_errors=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{shown}/mlflow.db")
    for attack in (*attacks.ALL, *storage.ALL, *replicas.ALL, *bentos.ALL):
        if args.only not in attack.__name__:
            continue
        if attack.__name__ in kept:
            rows.append(kept[attack.__name__])
            continue
        start = time.monotonic()
        with own_home() as home:
            try:
                row = attack(home, args.night, args.seed)
            except Exception as e:  # the drill goes on, and says so
                row = Row(attack.__name__, 0, False, note=f"the attack failed: {type(e).__name__}: {str(e)[:120]}")
        row = replace(row, took_s=time.monotonic() - start)
        rows.append(row)
        if args.keep and row.n:
            with args.keep.open("a") as f:
                f.write(json.dumps([attack.__name__, asdict(row)]) + "\n")
        print(f"{row.took_s:6.1f} s {row.line()}", flush=True)
    if args.write and not args.only:
        PAGE.write_text(page(rows, "night" if args.night else "short", args.seed))
    return int(not all(r.held for r in rows))


if __name__ == "__main__":
    sys.exit(main())
