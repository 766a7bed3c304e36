"""The verbs about the store: put, bring, list, show, compare."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.errors import PatchbayError
from registry.home import home
from registry.systems import SYSTEMS
from registry.verbs.said import (
    Says,
    artifact,
    check_served,
    compared,
    free,
    mirror,
    page,
    read_manifest,
    resolve,
    table,
    the_ledger,
    the_store,
    when,
    who,
)


def push(args: argparse.Namespace) -> Says:
    """put a sealed folder in the store; it becomes the challenger"""
    store, ledgers = the_store(), the_ledger()
    folder, run = args.folder, home() / "runs" / args.folder.name
    if len(folder.parts) == 1 and not folder.exists() and run.is_dir():  # as a service names what a request kept
        folder = run
    about = read_manifest(folder)
    name = about.system
    if about.kind == "finding":  # something to read: it is nobody's challenger
        pushed = store.push(folder)
        return Says(
            f"{name}@{pushed.version} sha256:{pushed.digest[:16]} is kept. {page(pushed.url)}", **asdict(pushed)
        )
    forced = check_served(name, folder, about, args.force)
    pushed = store.push(folder)
    ledgers.challenge(ledgers.Ledger(), name, pushed.digest, evidence=forced, who=who())
    warning = mirror(store, name)
    text = f"{name}@{pushed.version} sha256:{pushed.digest[:16]} is the challenger. {page(pushed.url)}{warning}"
    beside = store.compare_url(pushed.digest)
    if beside and store.page_answers():
        text += f"\nBeside its base: {beside}"
    text += f"\nNext: patchbay gate {name}@{pushed.version} (or eval), then split or promote it"
    return Says(text, **asdict(pushed), compare=beside)


def ui(args: argparse.Namespace) -> Says:
    """MLflow's page on this home's store, until Ctrl-C"""
    store = the_store()
    uri, place = store.tracking_uri(), home()
    if uri.startswith("http"):
        return Says(f"MLFLOW_TRACKING_URI names a server, whose page is {store.ui_url()}", url=store.ui_url())
    free(args.host, args.port)
    store.list_models()  # a database that cannot be used is told now
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", args.host, "--port", str(args.port), "--workers", "1",
        "--backend-store-uri", uri, "--default-artifact-root", str(place / "mlartifacts"),
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    url, said = f"http://{args.host}:{args.port}", place / store.UI
    log = (place / "ui.log").open("wb")
    import signal
    import subprocess

    with log, subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=log, stderr=log) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.terminate())
        try:
            said.write_text(json.dumps({"url": url, "pid": os.getpid()}))
            while server.poll() is None and not store.page_answers():
                time.sleep(0.3)
            if server.poll() is None:
                print(f"MLflow's page of {place}: {url}  (Ctrl-C ends it)", flush=True)  # noqa: T201  it stays
            code = server.wait()
        except KeyboardInterrupt:
            server.terminate()
            code = 0
        finally:
            said.unlink(missing_ok=True)
    if code > 0:
        raise PatchbayError(f"MLflow's server ended with exit status {code}; {place / 'ui.log'} says why.")
    return Says("stopped", url=url)


def pull(args: argparse.Namespace) -> Says:
    """bring an artifact here, verified"""
    folder = the_store().pull(artifact(args.ref))
    return Says(str(folder), folder=str(folder))


def listing(args: argparse.Namespace) -> Says:
    """artifacts in the store"""
    rows = the_store().list_models(args.system)
    shown = [
        (f"{r.system}@{r.version}", r.digest[:16], r.base.rpartition("@")[0], r.gate, ", ".join(r.aliases))
        for r in rows
    ]
    return Says(table(("artifact", "digest", "base", "gate", "aliases"), shown), artifacts=[asdict(r) for r in rows])


def show(args: argparse.Namespace) -> Says:
    """one artifact: lineage, config, metrics; or a system: its ledger"""
    if args.ref in SYSTEMS:
        ledgers = the_ledger()
        ledger = ledgers.Ledger()
        ledger.verify(args.ref)
        entries = ledger.history(args.ref, 20)
        rows = [
            (when(e.at), e.action, e.champion[:16], (e.challenger or "-")[:16], e.who, _why(e.evidence))
            for e in entries
        ]
        shown = table(("when", "action", "champion", "challenger", "who", "why"), rows)
        return Says(shown, history=[asdict(e) for e in entries])
    about = the_store().show(artifact(args.ref))
    return Says(json.dumps(about, indent=2, default=str), **about)


def compare(args: argparse.Namespace) -> Says:
    """two artifacts by the same metrics, and MLflow's page for it"""
    store = the_store()
    got = store.compare(resolve(args.a), artifact(args.b))
    rows = [compared(r.metric, r.a, r.b) for r in got.rows]
    head = ("metric", args.a, args.b, "difference", "n", "better")
    shown = table(head, rows) if rows else f"Nothing is measured of either yet. Next: patchbay eval {args.b}"
    return Says(f"{shown}\n{page(got.url)}", url=got.url, metrics=[r.plain() for r in got.rows])


def _why(evidence: dict[str, Any] | None) -> str | None:
    """An entry's evidence in a few words."""
    if not evidence:
        return None
    if (gate := evidence.get("gate")) and isinstance(gate, dict):
        return f"sha256:{gate['digest'][:16]} {gate['status']}"
    return f"forced: {evidence['forced']}" if "forced" in evidence else str(evidence.get("why") or "") or None
