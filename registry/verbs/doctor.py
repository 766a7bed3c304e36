"""The verb that looks at a set-up and says in words what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from registry import environment
from registry.errors import Conflict, PatchbayError, nearest, unsecret
from registry.home import cache, home, stale
from registry.systems import SYSTEMS
from registry.verbs.said import Says, free, short, the_ledger, the_store

ROOT = Path(__file__).parents[2]
LITTLE = 5 << 30
"""Bytes on a disk below which a fit or a converted base may not fit"""
PORTS = {"serve": 3000, "ui": 5000}
ENDPOINTS = ("torch", "transformers", "mlflow", "bentoml")
"""libraries whose versions explain most reports"""


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: Literal["ok", "note", "wrong"]
    what: str
    text: str


def doctor(args: argparse.Namespace) -> Says:
    """look at this set-up and say in words what is wrong: home, store, ledger, devices, ports, disk"""
    del args
    found: list[Finding] = []
    for look in (_program, _variables, _home, _disk, _ledger, _artifacts, _events, _store, _devices, _ports):
        try:
            found += look()
        except (PatchbayError, OSError, sqlite3.Error) as e:
            found.append(Finding("wrong", look.__name__.strip("_"), unsecret(str(e))))
    wrong = [f for f in found if f.state == "wrong"]
    mark = {"ok": "ok    ", "note": "note  ", "wrong": "WRONG "}
    lines = [f"{mark[f.state]}{f.what:11}{f.text}" for f in found]
    said = Says(
        "\n".join([*lines, f"{len(wrong)} wrong." if wrong else "All is well."]), findings=[f._asdict() for f in found]
    )
    said.status = 1 if wrong else 0
    return said


def _program() -> Iterator[Finding]:
    import shutil
    from importlib import metadata  # brings the e-mail parser, which no other verb needs

    versions = []
    for name in ENDPOINTS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
            continue
        yield Finding(
            "wrong", "program", f"{name} is not installed in {sys.prefix}. Run: make test, or pip install -e ."
        )
    at = shutil.which("patchbay")
    yield Finding("ok", "program", f"{ROOT}, Python {sys.version.split()[0]}, {', '.join(versions)}")
    if at is None:
        activate = Path(sys.prefix) / "bin" / "activate"
        yield Finding("note", "program", f"patchbay is not on the path. In this shell: source {activate}")


def _variables() -> Iterator[Finding]:
    known = {**environment.VARIABLES, **environment.OTHERS}
    for name in sorted(os.environ):
        if name.startswith("PATCHBAY_") and name not in known:
            near = nearest(name, environment.VARIABLES, 3)
            yield Finding("wrong", "variable", f"{name} is read by nobody. Like it: {near}. All: docs/settings.md")
    tokens = os.environ.get("PATCHBAY_TOKENS")
    if tokens:
        importlib.import_module("bentos.tokens").Tokens.from_environment()
        yield Finding("ok", "variable", "PATCHBAY_TOKENS is a file of tokens")


def _home() -> Iterator[Finding]:
    place = home()
    if not os.access(place, os.W_OK):
        yield Finding("wrong", "home", f"{place} cannot be written. Choose another with PATCHBAY_HOME.")
        return
    yield Finding("ok", "home", str(place))
    left = [p for folder in ("runs", "artifacts", "exports") for p in stale(place / folder)]
    if left:
        yield Finding(
            "note",
            "home",
            f"{len(left)} half-written folders are left over ({left[0].name}); the next fit or push removes them",
        )


def _disk() -> Iterator[Finding]:
    import shutil

    for what, place in (("home", home()), ("cache", cache())):
        left = shutil.disk_usage(place).free
        text = f"{left / 2**30:.1f} GiB free for the {what} {place}"
        enough = left >= LITTLE
        more = "" if enough else f"; less than {LITTLE >> 30} GiB. Make room, or set PATCHBAY_{what.upper()} elsewhere."
        yield Finding("ok" if enough else "wrong", "disk", text + more)


def _ledger() -> Iterator[Finding]:
    ledger = the_ledger().Ledger()
    yield Finding("ok", "ledger", f"{ledger.verify()} entries, every chain holds ({ledger.database})")
    for name in SYSTEMS:
        head = ledger.head(name)
        if head is None:
            continue
        trial = f", experiment {head.experiment['name']} runs" if head.experiment else ""
        other = f", challenger {short(head.challenger)}" if head.challenger else ""
        yield Finding("ok", "ledger", f"{name}: champion {short(head.champion)}{other}{trial}")


def _artifacts() -> Iterator[Finding]:
    ledger, store = the_ledger().Ledger(), the_store()
    count = 0
    for name in SYSTEMS:
        head = ledger.head(name)
        for role, digest in (("champion", head.champion), ("challenger", head.challenger)) if head else ():
            if digest is None or digest == "base":
                continue
            try:
                store.pull(digest)
                count += 1
            except PatchbayError as e:
                yield Finding("wrong", "artifact", f"{name}'s {role}: {unsecret(str(e))}")
    yield Finding("ok", "artifact", f"{count} that the ledger names are here, every byte verified")


def _events() -> Iterator[Finding]:
    if os.environ.get("PATCHBAY_DB"):
        log = importlib.import_module("registry.ab.events").Events()
        yield Finding("ok", "events", f"{log.count()} ({log.database})")
        log.close()
        return
    file = home() / "events.db"
    if not file.is_file():
        yield Finding("ok", "events", "none yet")
        return
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)) as db:
        said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    yield Finding("ok" if said == "ok" else "wrong", "events", f"{file}: {said}")


def _store() -> Iterator[Finding]:
    store = the_store()
    rows = store.list_models()
    waiting = [r for r in rows if r.gate != "passed"]
    gates = f", {len(waiting)} not through their gate" if waiting else ""
    yield Finding("ok", "store", f"{unsecret(store.tracking_uri())}: {len(rows)} artifacts{gates}")
    page = store.ui_url() if store.page_answers() else "not running; patchbay ui starts it"
    yield Finding("ok", "page", f"MLflow's page: {page}")


def _devices() -> Iterator[Finding]:
    torch = importlib.import_module("torch")
    threads = f"cpu, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        yield Finding("ok", "device", f"{threads}; no GPU that torch {torch.__version__} can use")
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        left, whole = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        yield Finding("ok", "device", f"{threads}; cuda:{i} {name}, {left / 2**30:.1f} of {whole / 2**30:.1f} GiB free")
    wanted = os.environ.get("PATCHBAY_DEVICE")
    if wanted:
        importlib.import_module("patches.families.base").check_device(wanted)


def _ports() -> Iterator[Finding]:
    for verb, port in PORTS.items():
        try:
            free("127.0.0.1", port)
            yield Finding("ok", "port", f"{port} is free for patchbay {verb}")
        except Conflict:
            yield Finding("note", "port", f"{port} is taken; say --port N to patchbay {verb}")
