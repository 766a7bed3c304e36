"""`patchbay import`: says what a folder or file of others is, and seals what can be added to a base as a patch."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from registry.errors import ConfigError
from registry.home import home
from registry.verbs.said import Says


def bring(args: argparse.Namespace) -> Says:
    """say what a folder of others is; with base=REF bring an adapter or vectors in as a patch"""
    imports = importlib.import_module("patches.imports")
    said = dict(word.partition("=")[::2] for word in args.words)
    if unknown := said.keys() - {"base", "amount", "family"}:
        raise ConfigError(f"{sorted(unknown)[0]!r} is nothing that import takes; it takes base=, amount= and family=.")
    found = imports.look(args.place)
    if "base" not in said:
        return Says(f"{args.place}: {found.text}", kind=found.kind, what=found.text, reference=found.reference)
    try:
        amount = float(said.get("amount", "1"))
    except ValueError:
        raise ConfigError(f"amount={said['amount'][:40]!r} is no number.") from None
    import shutil
    import tempfile

    runs = home() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=runs, prefix=".part-"))
    try:
        about = imports.bring(args.place, said["base"], part / "made", said.get("family", ""), amount)
        folder = args.out or runs / f"{about.system}-{about.digest[:16]}"
        if not folder.exists():
            shutil.move(part / "made", folder)
        importlib.import_module("registry.manifest").read(folder, digest=about.digest)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    on = about.base.rpartition("@")[0]
    text = f"{folder}\nsha256:{about.digest} of {about.system} on {on}. Next: patchbay push {folder}"
    return Says(text, kind=found.kind, folder=str(folder), digest=about.digest, system=about.system)
