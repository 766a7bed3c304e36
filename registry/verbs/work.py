"""The verbs that compute: fit, measure, fold, package, serve."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from registry.errors import NotFound, PatchbayError
from registry.home import home
from registry.systems import SYSTEMS, system
from registry.verbs.readme import write_readme
from registry.verbs.said import (
    Says,
    artifact,
    columns,
    compared,
    free,
    name_of,
    page,
    read_manifest,
    resolve,
    table,
    the_ledger,
    the_store,
)

ROOT = Path(__file__).parents[2]


def systems(args: argparse.Namespace) -> Says:
    """the ten systems, and which are planned"""
    if args.write_readme:
        return write_readme()
    rows = [{"name": r.name, "title": r.title, "status": "planned" if r.planned else "ready"} for r in SYSTEMS.values()]
    return Says("\n".join(f"{r['name']:16}{r['status']:9}{r['title']}" for r in rows), systems=rows)


def fit(args: argparse.Namespace) -> Says:
    """run a recipe into a sealed folder"""
    run = importlib.import_module("training.run")
    start = time.monotonic()
    folder = run.fit(args.recipe, args.words)
    digest = read_manifest(folder).digest
    text = f"{folder}\nsha256:{digest} in {time.monotonic() - start:.0f} s. Next: patchbay push {folder}"
    return Says(text, folder=str(folder), digest=digest)


def evaluate(args: argparse.Namespace) -> Says:
    """measure an artifact and its base, keep both in the store"""
    run, store = importlib.import_module("training.run"), the_store()
    folder = store.pull(artifact(args.ref))
    got = run.evaluate(folder, args.words, args.device)
    pushed = store.push(
        folder, metrics=got.sides, dataset=got.dataset, figures=got.figures["patched"], base_figures=got.figures["base"]
    )
    base, patched = got.sides["base"], got.sides["patched"]
    rows = [compared(k, base.get(k), patched.get(k)) for k in sorted({*base, *patched})]
    url = store.compare_url(pushed.digest)
    plain = {side: {k: asdict(m) for k, m in metrics.items()} for side, metrics in got.sides.items()}
    text = table(("metric", "base", "patched", "difference", "n", "better"), rows) + f"\n{page(url)}".rstrip()
    if not args.full:
        return Says(text, metrics=plain, run=pushed.run_id, url=url)
    full = run.report(folder, args.words, args.device)
    store.push(folder, tables=full.tables, figures=full.figures)
    shown = [text, *(f"\n{name}\n{columns(made)}" for name, made in full.tables.items())]
    return Says("\n".join(shown), metrics=plain, run=pushed.run_id, url=url, tables=full.tables)


def serve(args: argparse.Namespace) -> Says:
    """serve a system: base and every patch in one process, OpenAI-compatible where it generates"""
    flags = {"base": args.base, "device": args.device, "dtype": args.dtype, "provider": args.provider,
             "workers": args.workers, "slots": args.slots, "context": args.context, "tokens": args.tokens}  # fmt: skip
    given = {f"PATCHBAY_{flag.upper()}": str(value) for flag, value in flags.items() if value is not None}
    name, app = system(args.system).name, importlib.import_module("bentos.app")
    free(args.host, args.port)
    app.serve(name, host=args.host, port=args.port, given=given)
    return Says("stopped")


def build(args: argparse.Namespace) -> Says:
    """a Bento of an artifact, or of a system's champion and challenger; its Dockerfile and Kubernetes manifests"""
    digest, name = resolve(args.ref), name_of(args.ref)
    head = the_ledger().Ledger().head(name) if args.ref == name else None
    tried = head.experiment["treatment"] if head and head.experiment else None
    beside = [d for d in (head.challenger, tried) if d not in (None, "base", digest)] if head else []
    made = importlib.import_module("bentos.build").build(name, digest, args.out, args.image, beside)
    return Says(f"{made.tag}\n{made.folder}", tag=made.tag, folder=str(made.folder), carried=[digest, *beside])


def bench(args: argparse.Namespace) -> Says:
    """base, patched and folded, interleaved; results kept with the version"""
    import subprocess

    store = the_store()
    digest = resolve(args.ref)
    file = ROOT / ".patchbay" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "bench", f"--benchmark-json={file}", "tests/bench"]
    code = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PATCHBAY_BENCH": digest}).returncode
    if code:
        raise PatchbayError(f"The benchmark failed with exit status {code}; nothing was kept.")
    results = importlib.import_module("tests.bench.results").ratios(file)
    store.log_bench(digest, results, file)
    return Says(
        table(("ratio", "base", "patched"), [(k, results["base"][k], v) for k, v in results["patched"].items()])
    )


def export(args: argparse.Namespace) -> Says:
    """fold a patch into a hook-free checkpoint, or write it as other libraries read it (--as others)"""
    digest = resolve(args.ref)
    if args.layout == "others" and digest != "base":
        place = args.out or home() / "exports" / f"others-{digest[:16]}"
        what = importlib.import_module("patches.imports").send(the_store().pull(digest), place)
        return Says(f"{place}: {what}", folder=str(place), what=what)
    if digest == "base":
        raise NotFound(f"{args.ref} is the base itself, so there is nothing to fold. Name a patch: SYSTEM@challenger")
    base = os.environ.get("PATCHBAY_BASE") or None  # where a base fitted from a folder lies on this machine
    folder = importlib.import_module("patches.export").export(the_store().pull(digest), args.out, base)
    return Says(str(folder), folder=str(folder))
