"""The verbs that compute: fit, measure, fold, package, serve."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from registry.errors import ConfigError, NotFound, PatchbayError
from registry.home import home
from registry.systems import SYSTEMS, system
from registry.verbs.readme import write_readme
from registry.verbs.said import (
    Says,
    artifact,
    check_signed,
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
    name, launch = system(args.system).name, importlib.import_module("bentos.launch")
    free(args.host, args.port)
    launch.serve(name, host=args.host, port=args.port, given=given)
    return Says("stopped")


def build(args: argparse.Namespace) -> Says:
    """a Bento of an artifact, or of a system's champion and challenger; its Dockerfile and Kubernetes manifests"""
    digest, name = resolve(args.ref), name_of(args.ref)
    head = the_ledger().Ledger().head(name) if args.ref == name else None
    tried = head.experiment["treatment"] if head and head.experiment else None
    beside = [d for d in (head.challenger, tried) if d not in (None, "base", digest)] if head else []
    for one in [d for d in (digest, *beside) if d != "base"]:
        check_signed(the_store().pull(one), one)
    builder = importlib.import_module("bentos.build")
    made = builder.build(name, digest, args.out, args.image, beside)
    supply = importlib.import_module("bentos.build.supply")
    files = supply.write(made.folder, args.hashes, made.bento / builder.INSTALLS)
    lacks = supply.check((made.folder / "Dockerfile").read_text())
    text = f"{made.tag}\n{made.folder}: {', '.join(f.name for f in files)}" + "".join(f"\nNote: {why}" for why in lacks)
    names = [str(f) for f in files]
    return Says(text, tag=made.tag, folder=str(made.folder), carried=[digest, *beside], files=names, lacks=lacks)


def bench(args: argparse.Namespace) -> Says:
    """base, patched and folded, interleaved, kept with the version; --all: docs/NUMBERS.md, every system"""
    import subprocess

    if args.all == (args.ref is not None):
        raise ConfigError("Name what is measured (patchbay bench REF), or --all for the page of numbers; one of them.")
    if args.all:
        done = subprocess.run([sys.executable, "-m", "tests.bench.numbers"], cwd=ROOT, check=False).returncode
        said = Says(str(ROOT / "docs" / "NUMBERS.md"), page=str(ROOT / "docs" / "NUMBERS.md"))
        said.status = done
        return said
    store = the_store()
    digest = artifact(args.ref)
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
    """fold a patch into a hook-free checkpoint, or write it as others read it (--as others), with its model card"""
    digest, store = artifact(args.ref), the_store()
    if args.layout == "card":
        file = args.out or home() / "exports" / f"{digest[:16]}.md"
        return Says(f"{_carded(digest, file)}", card=str(file))
    if args.layout == "others":
        place = args.out or home() / "exports" / f"others-{digest[:16]}"
        what = importlib.import_module("patches.imports").send(store.pull(digest), place)
        if place.is_dir():
            _carded(digest, place / "README.md")
        return Says(f"{place}: {what}", folder=str(place), what=what)
    base = os.environ.get("PATCHBAY_BASE") or None  # where a base fitted from a folder lies on this machine
    folder = importlib.import_module("patches.export").export(store.pull(digest), args.out, base)
    # beside it and not in it: it changes with what is measured, and the checkpoint's digest must not
    card = _carded(digest, folder.with_name(f"{folder.name}.README.md"))
    return Says(f"{folder}\nIts model card: {card}", folder=str(folder), card=str(card))


def _carded(digest: str, file: Path) -> Path:
    """Write an artifact's model card to `file`: with what the store measured of it, if it was pushed."""
    store = the_store()
    sealed = store.pull(digest)
    try:
        text = store.card_of(digest, sealed)
    except NotFound:
        text = importlib.import_module("registry.card").card(sealed, read_manifest(sealed))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
