"""The command line. Every verb prints one line (or one table) for people, `--json` for programs.

Exit status: 0 done, 1 refused (the message says why and what to do), 2 the words make no sense.
It finds systems through the table and imports training and services only inside the verb that needs them.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from registry.errors import ConfigError, Conflict, Invalid, NotFound, PatchbayError, unsecret
from registry.systems import SYSTEMS, system

ROOT = Path(__file__).parent.parent


class Says(dict[str, Any]):
    """What a verb answers: a mapping for programs, `text` for people."""

    def __init__(self, text: str, **values: Any) -> None:
        super().__init__(values)
        self.text = text


def systems(args: argparse.Namespace) -> Says:
    """the ten systems, and which are planned"""
    if args.write_readme:
        return _write_readme()
    rows = [{"name": r.name, "title": r.title, "status": "planned" if r.planned else "ready"} for r in SYSTEMS.values()]
    return Says("\n".join(f"{r['name']:16}{r['status']:9}{r['title']}" for r in rows), systems=rows)


def fit(args: argparse.Namespace) -> Says:
    """run a recipe into a sealed folder"""
    run = importlib.import_module("training.run")
    start = time.monotonic()
    folder = run.fit(args.recipe, args.words)
    digest = _manifest(folder).digest
    text = f"{folder}\nsha256:{digest} in {time.monotonic() - start:.0f} s. Next: patchbay push {folder}"
    return Says(text, folder=str(folder), digest=digest)


def evaluate(args: argparse.Namespace) -> Says:
    """measure an artifact and its base, keep both in the store"""
    run, store = importlib.import_module("training.run"), _store()
    folder = store.pull(_digest(args.ref))
    got = run.evaluate(folder, args.words, args.device)
    pushed = store.push(
        folder, metrics=got.sides, dataset=got.dataset, figures=got.figures["patched"], base_figures=got.figures["base"]
    )
    base, patched = got.sides["base"], got.sides["patched"]
    rows = [_compared(k, base.get(k), patched.get(k)) for k in sorted({*base, *patched})]
    url = store.compare_url(pushed.digest)
    plain = {side: {k: asdict(m) for k, m in metrics.items()} for side, metrics in got.sides.items()}
    text = _table(("metric", "base", "patched", "difference", "n", "better"), rows) + (f"\n{url}" if url else "")
    if not args.full:
        return Says(text, metrics=plain, run=pushed.run_id, url=url)
    full = run.report(folder, args.words, args.device)
    store.push(folder, tables=full.tables, figures=full.figures)
    shown = [text, *(f"\n{name}\n{_columns(columns)}" for name, columns in full.tables.items())]
    return Says("\n".join(shown), metrics=plain, run=pushed.run_id, url=url, tables=full.tables)


def push(args: argparse.Namespace) -> Says:
    """put a sealed folder in the store; it becomes the challenger"""
    store, ledgers = _store(), _ledger()
    about = _manifest(args.folder)
    name = about.system
    if about.kind == "finding":  # something to read: it is nobody's challenger
        pushed = store.push(args.folder)
        return Says(f"{name}@{pushed.version} sha256:{pushed.digest[:16]} is kept. {pushed.url}", **asdict(pushed))
    _check_served(name, args.folder, about, args.force)
    pushed = store.push(args.folder)
    ledgers.challenge(ledgers.Ledger(), name, pushed.digest, who=_who())
    warning = _mirror(store, name)
    text = f"{name}@{pushed.version} sha256:{pushed.digest[:16]} is the challenger. {pushed.url}{warning}"
    beside = store.compare_url(pushed.digest)
    text += f"\nBeside its base: {beside}" if beside else f"\nNext: patchbay eval {name}@{pushed.version}"
    return Says(text, **asdict(pushed), compare=beside)


def pull(args: argparse.Namespace) -> Says:
    """bring an artifact here, verified"""
    folder = _store().pull(_digest(args.ref))
    return Says(str(folder), folder=str(folder))


def listing(args: argparse.Namespace) -> Says:
    """artifacts in the store"""
    rows = _store().list_models(args.system)
    table = [(f"{r.system}@{r.version}", r.digest[:16], r.base.rpartition("@")[0], ", ".join(r.aliases)) for r in rows]
    return Says(_table(("artifact", "digest", "base", "aliases"), table), artifacts=[asdict(r) for r in rows])


def show(args: argparse.Namespace) -> Says:
    """one artifact: lineage, config, metrics; or a system: its ledger"""
    if args.ref in SYSTEMS:
        ledgers = _ledger()
        ledger = ledgers.Ledger()
        ledger.verify(args.ref)
        entries = ledger.history(args.ref, 20)
        rows = [(_when(e.at), e.action, e.champion[:16], (e.challenger or "-")[:16], e.who) for e in entries]
        table = _table(("when", "action", "champion", "challenger", "who"), rows)
        return Says(table, history=[asdict(e) for e in entries])
    about = _store().show(_digest(args.ref))
    return Says(json.dumps(about, indent=2, default=str), **about)


def compare(args: argparse.Namespace) -> Says:
    """two artifacts by the same metrics, and MLflow's page for it"""
    store = _store()
    got = store.compare(_digest(args.a), _digest(args.b))
    rows = [_compared(r.metric, r.a, r.b) for r in got.rows]
    head = ("metric", args.a, args.b, "difference", "n", "better")
    return Says(f"{_table(head, rows)}\n{got.url}", url=got.url, metrics=[r.plain() for r in got.rows])


def split(args: argparse.Namespace) -> Says:
    """begin a production A/B of an artifact against the champion; a larger share ramps it, 0 stops it"""
    ledgers, experiments = _ledger(), importlib.import_module("registry.ab.experiment")
    name = args.system
    ref, share, words = _split_words(args.words)
    ledger = ledgers.Ledger()
    head = ledger.head(name)
    live = head.experiment if head else None
    if share == 0:
        ledgers.stop(ledger, name, who=_who())
        return Says(f"{name}: the experiment is stopped; everyone gets the champion.", system=name, share=0)
    if live and ref in (None, live["treatment"]):
        ledgers.ramp(ledger, name, share, who=_who())
        return Says(f"{name}: the challenger's share is now {share:.0%}; nobody already in it left.", share=share)
    treatment = _digest(ref or f"{name}@challenger")
    _check_digest(name, treatment, args.force)
    made = experiments.begin(
        name, control=head.champion if head else "base", treatment=treatment, share=share, words=words
    )
    ledgers.split(ledger, name, experiments.plain(made), who=_who())
    warning = _mirror(_store(), name)
    text = f"{name}: {share:.0%} of units get sha256:{treatment[:16]} ({made.mode}, experiment {made.name}).{warning}"
    wanted = made.margin or made.tau * (made.high - made.low)
    text += (
        f"\nIt takes up to {experiments.power(made, wanted):,} units until a difference of {wanted:g} is found 80 % of "
        f"the time; outcomes must lie from {made.low:g} to {made.high:g} and use that range."
    )
    return Says(text, experiment=made.name, share=share)


def report(args: argparse.Namespace) -> Says:
    """the live experiment: effect with an always-valid interval, guardrails, verdict"""
    ledgers, experiments = _ledger(), importlib.import_module("registry.ab.experiment")
    events = importlib.import_module("registry.ab.events")
    entries = [e for e in ledgers.Ledger().history(args.system, 50) if e.experiment]
    if not entries:
        raise NotFound(f"{args.system} has had no experiment. Begin one: patchbay split {args.system} REF 0.1")
    experiment = experiments.load(entries[0].experiment)
    with events.Events() as log:
        decision = experiments.judge(experiment, log.summary(experiment))
        drawn = importlib.import_module("registry.ab.picture").picture(experiment, log.trajectory(experiment))
    file = importlib.import_module("registry.home").home() / "reports" / f"{experiment.name}.png"
    file.parent.mkdir(exist_ok=True)
    drawn.savefig(file, dpi=110)
    warning = _store().show_experiment(experiment.name, drawn, decision.evidence())
    text = f"{experiments.describe(experiment, decision)}\n  picture    {file}{f' ({warning})' if warning else ''}"
    return Says(text, picture=str(file), **decision.evidence())


def promote(args: argparse.Namespace) -> Says:
    """make an artifact the champion; running services follow within seconds"""
    ledgers, store = _ledger(), _store()
    name = args.ref.partition("@")[0]
    digest = _digest(args.ref if "@" in args.ref or ":" in args.ref else f"{args.ref}@challenger")
    if name not in SYSTEMS:
        name = _manifest(store.pull(digest)).system
    _check_digest(name, digest, args.force)  # what cannot be verified here is not promoted
    entry = ledgers.promote(ledgers.Ledger(), name, digest, who=_who())
    return Says(f"{name}: champion is {_short(entry.champion)}.{_mirror(store, name)}", **asdict(entry))


def rollback(args: argparse.Namespace) -> Says:
    """the champion before this one is the champion again"""
    ledgers = _ledger()
    entry = ledgers.rollback(ledgers.Ledger(), args.system, who=_who())
    return Says(
        f"{args.system}: champion is {_short(entry.champion)} again.{_mirror(_store(), args.system)}", **asdict(entry)
    )


def serve(args: argparse.Namespace) -> Says:
    """serve a system: base and every patch in one process, OpenAI-compatible where it generates"""
    importlib.import_module("bentos.app").serve(system(args.system).name, host=args.host, port=args.port)
    return Says("stopped")


def build(args: argparse.Namespace) -> Says:
    """a Bento of an artifact, its Dockerfile and Kubernetes manifests"""
    store = _store()
    digest = _digest(args.ref)
    name = args.ref.partition("@")[0]
    name = name if name in SYSTEMS else _manifest(store.pull(digest)).system
    made = importlib.import_module("bentos.build").build(name, digest, args.out, args.image)
    return Says(f"{made.tag}\n{made.folder}", tag=made.tag, folder=str(made.folder))


def bench(args: argparse.Namespace) -> Says:
    """base, patched and folded, interleaved; results kept with the version"""
    import subprocess

    store = _store()
    digest = _digest(args.ref)
    file = ROOT / ".patchbay" / "bench.json"
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "bench", f"--benchmark-json={file}", "tests/bench"]
    code = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "PATCHBAY_BENCH": digest}).returncode
    if code:
        raise PatchbayError(f"The benchmark failed with exit status {code}; nothing was kept.")
    results = importlib.import_module("tests.bench.results").ratios(file)
    store.log_bench(digest, results, file)
    return Says(
        _table(("ratio", "base", "patched"), [(k, results["base"][k], v) for k, v in results["patched"].items()])
    )


def export(args: argparse.Namespace) -> Says:
    """fold a patch into a hook-free checkpoint"""
    digest = _digest(args.ref)
    if digest == "base":
        raise NotFound(f"{args.ref} is the base itself, so there is nothing to fold. Name a patch: SYSTEM@challenger")
    base = os.environ.get("PATCHBAY_BASE") or None  # where a base fitted from a folder lies on this machine
    folder = importlib.import_module("patches.export").export(_store().pull(digest), args.out, base)
    return Says(str(folder), folder=str(folder))


# ---- what the verbs share --------------------------------------------------------------------------------------


def _split_words(words: Sequence[str]) -> tuple[str | None, float, list[str]]:
    """[REF] SHARE [key=value ...] -> reference, share, settings."""
    settings = [w for w in words if "=" in w]
    *ref, share = [w for w in words if "=" not in w] or [""]
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if len(ref) > 1 or not 0.0 <= value <= 1.0:
        raise ConfigError(f"split wants [REF] SHARE [key=value ...] with a share from 0 to 1, not {' '.join(words)!r}.")
    return (ref[0] if ref else None), value, settings


def _store() -> Any:
    return importlib.import_module("registry.store")


def _ledger() -> Any:
    return importlib.import_module("registry.ab.ledger")


def _manifest(folder: Path | str) -> Any:
    return importlib.import_module("registry.manifest").read(Path(folder))


def _digest(ref: str) -> str:
    digest: str = _store().resolve(ref, _ledger().Ledger())
    return digest


def _mirror(store: Any, name: str) -> str:
    """Show the ledger's champion and challenger as MLflow aliases; a warning if MLflow cannot be reached."""
    head = _ledger().Ledger().head(name)
    warning = store.mirror(name, head.champion, head.challenger) if head else None
    return f" ({warning})" if warning else ""


def _check_digest(name: str, digest: str, force: bool) -> None:
    """As `_check_served`, for what the store has."""
    if digest != "base":
        folder = _store().pull(digest)
        _check_served(name, folder, _manifest(folder), force)


def _check_served(name: str, folder: Path, about: Any, force: bool) -> None:
    """Raises Conflict for what a service of this system could not serve beside its champion; it may be forced."""
    head = _ledger().Ledger().head(name)
    bases: dict[str, str] = {}
    if head and head.champion not in ("base", about.digest):
        now = _manifest(_store().pull(head.champion)).bases
        bases = {role: label.rpartition("@")[2] for role, label in now.items()}
    try:
        importlib.import_module("patches.subject").check_servable(folder, name, bases)
    except PatchbayError as e:
        if not force:
            raise Conflict(
                f"A service of {name} could not serve this beside its champion; --force does it all the same. {e}"
            ) from None


def _who() -> str:
    return os.environ.get("PATCHBAY_WHO") or os.environ.get("USER") or "unknown"


def _short(digest: str) -> str:
    return digest if digest == "base" else f"sha256:{digest[:16]}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def _compared(name: str, a: Any, b: Any) -> tuple[Any, ...]:
    """One metric of two arms as a row: values with intervals, difference, n, and which way is better."""
    both = [m for m in (a, b) if m is not None]
    n = "/".join(dict.fromkeys(str(m.n) for m in both if m.n is not None))
    better = next((m.better for m in both if m.better), "")
    return name, _measure(a), _measure(b), b.value - a.value if len(both) == 2 else None, n or None, better or None


def _measure(m: Any) -> str | None:
    """A measured number with its 95 % interval, if it has one."""
    if m is None:
        return None
    return f"{m.value:.4g}" + (f" [{m.low:.3g}, {m.high:.3g}]" if m.low is not None else "")


def _columns(columns: dict[str, list[Any]]) -> str:
    """A table given by its columns; those with nothing in them are left out."""
    some = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    return _table(tuple(some), list(zip(*some.values(), strict=True)))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:
        return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    cells = [list(head), *([text(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _write_readme() -> Says:
    """README's table of systems between its two marks."""
    readme = ROOT / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- systems -->\n")
    _, end, after = rest.partition("<!-- /systems -->")
    if not mark or not end:
        raise ConfigError("README.md has lost its <!-- systems --> marks.")
    readme.write_text(before + mark + readme_table() + end + after)
    return Says("README.md: the table of systems is written.")


def readme_table() -> str:
    """The table of systems as README shows it: one claim a row, with its control and n."""
    lines = ["| system | claim | base | patched | control | n | artifact |", "|---|---|---|---|---|---|---|"]
    for row in SYSTEMS.values():
        name = f"`{row.name}` ([{row.paper}](https://arxiv.org/abs/{row.paper}))<br>{row.title}"
        if (c := row.claim) is None:
            lines.append(f"| {name} | {'planned' if row.planned else 'not measured yet'} | | | | | |")
            continue
        metric = c.metric + (f"<br>{c.beside}" if c.beside else "")
        control = f"{c.show(c.control)} ({c.what_control})"
        numbers = f"{c.show(c.base)} | **{c.show(c.patched)}** | {control} | {c.n:,} | `{c.digest}`"
        lines.append(f"| {name} | {metric} | {numbers} |")
    return "\n".join(lines) + "\n"


VERBS: dict[str, Callable[[argparse.Namespace], Says]] = {
    "systems": systems,
    "fit": fit,
    "eval": evaluate,
    "push": push,
    "pull": pull,
    "list": listing,
    "show": show,
    "compare": compare,
    "split": split,
    "report": report,
    "promote": promote,
    "rollback": rollback,
    "serve": serve,
    "build": build,
    "bench": bench,
    "export": export,
}
"""the whole command line; a test holds it to this set"""


def parser() -> argparse.ArgumentParser:
    """Verbs and their words."""
    out = argparse.ArgumentParser(prog="patchbay", description="Patch, register, serve and A/B models.")
    verbs = out.add_subparsers(dest="verb", required=True, metavar="VERB")
    made = {}
    for name, verb in VERBS.items():
        made[name] = verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        made[name].add_argument("--json", action="store_true", help="answer for programs")
    ref: Any = {"metavar": "REF", "help": "system, system@challenger, system@3, sha256:digest, or a sealed folder"}
    made["systems"].add_argument("--write-readme", action="store_true", help="write README's table")
    made["fit"].add_argument("recipe", metavar="SYSTEM[/RECIPE]")
    made["push"].add_argument("folder", type=Path)
    for name in ("eval", "pull", "show", "promote", "build", "bench", "export"):
        made[name].add_argument("ref", **ref)
    for name in ("fit", "eval"):
        made[name].add_argument("words", nargs="*", metavar="key=value", help="settings to change")
    for name in ("push", "split", "promote"):
        made[name].add_argument("--force", action="store_true", help="even if no service could serve it")
    made["split"].add_argument("system")
    # argparse cannot tell an optional word from the ones after it, so `split` sorts them itself
    made["split"].add_argument(
        "words", nargs="+", metavar="[REF] SHARE [key=value]",
        help="what to try (the challenger); 0.1 for 10 %%, more ramps, 0 stops; settings of the experiment",
    )  # fmt: skip
    made["eval"].add_argument("--device", help="default: where it was fitted")
    made["eval"].add_argument("--full", action="store_true", help="the whole report: controls, baselines, tables")
    made["list"].add_argument("system", nargs="?")
    made["compare"].add_argument("a", **ref)
    made["compare"].add_argument("b", **ref)
    for name in ("report", "rollback", "serve"):
        made[name].add_argument("system")
    made["serve"].add_argument("--host", default="127.0.0.1")
    made["serve"].add_argument("--port", type=int, default=3000)
    for name in ("build", "export"):
        made[name].add_argument("--out", type=Path, default=None)
    made["build"].add_argument("--image", help="what the Kubernetes manifests call the container image")
    return out


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status. Without words: those of the process, which then ends."""
    if words is None:
        # libraries make a million objects that last; looking for garbage among them, time and again and once more at
        # the end, is a quarter of a small fit
        gc.set_threshold(10_000, 50)
        atexit.register(gc.freeze)
    args = parser().parse_args(words)
    if "system" in args and args.system and args.verb != "list":
        try:
            system(args.system)
        except NotFound as e:
            return _refused(e, 2)
    try:
        said = VERBS[args.verb](args)
    except (ConfigError, Invalid) as e:
        return _refused(e, 2)
    except PatchbayError as e:
        return _refused(e, 1)
    except (OSError, sqlite3.Error) as e:
        return _refused(f"This machine refuses it: {e}. Look at the disk and at who may write there.", 1)
    except KeyboardInterrupt:
        return 130
    print(json.dumps(said, default=str) if args.json else said.text)
    return 0


def _refused(why: object, status: int) -> int:
    print(unsecret(str(why)), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
