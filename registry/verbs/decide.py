"""The verbs that decide what users get: split, report, promote, roll back."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from registry.errors import ConfigError, NotFound, NotReady, PatchbayError
from registry.systems import SYSTEMS
from registry.verbs.said import Says, check_digest, mirror, name_of, resolve, short, the_ledger, the_store, who


def split(args: argparse.Namespace) -> Says:
    """begin a production A/B of an artifact against the champion; a larger share ramps it, 0 stops it"""
    ledgers, experiments = the_ledger(), importlib.import_module("registry.ab.experiment")
    name = args.system
    ref, share, words = split_words(args.words)
    ref = f"{name}{ref}" if ref is not None and ref.startswith("@") else ref
    ledger = ledgers.Ledger()
    head = ledger.head(name)
    live = head.experiment if head else None
    if share == 0:
        ledgers.stop(ledger, name, who=who())
        return Says(f"{name}: the experiment is stopped; everyone gets the champion.", system=name, share=0)
    if live and ref in (None, live["treatment"]):
        ledgers.ramp(ledger, name, share, who=who())
        return Says(f"{name}: the challenger's share is now {share:.0%}; nobody already in it left.", share=share)
    treatment = resolve(ref or f"{name}@challenger")
    forced = check_digest(name, treatment, args.force)
    made = experiments.begin(
        name, control=head.champion if head else "base", treatment=treatment, share=share, words=words
    )
    ledgers.split(ledger, name, experiments.plain(made), evidence=forced, who=who())
    lag = the_store().begin_experiment(made.name, name, made.control, made.treatment)
    warning = f" ({lag})" if lag else mirror(the_store(), name)
    text = f"{name}: {share:.0%} of units get sha256:{treatment[:16]} ({made.mode}, experiment {made.name}).{warning}"
    wanted = made.margin or made.tau * (made.high - made.low)
    text += (
        f"\nIt takes up to {experiments.power(made, wanted):,} units until a difference of {wanted:g} is found 80 % of "
        f"the time; outcomes must lie from {made.low:g} to {made.high:g} and use that range."
    )
    return Says(text, experiment=made.name, share=share)


def report(args: argparse.Namespace) -> Says:
    """the live experiment: effect with an always-valid interval, guardrails, verdict"""
    ledgers, experiments = the_ledger(), importlib.import_module("registry.ab.experiment")
    events = importlib.import_module("registry.ab.events")
    entries = [e for e in ledgers.Ledger().history(args.system, 50) if e.experiment]
    if not entries:
        raise NotFound(f"{args.system} has had no experiment. Begin one: patchbay split {args.system} REF 0.1")
    experiment = experiments.load(entries[0].experiment)
    judged = _judged(args) if args.judge else ""
    several = importlib.import_module("registry.ab.several")
    with events.Events() as log:
        summary = log.summary(experiment)
        decision = experiments.judge(experiment, summary)
        drawn = importlib.import_module("registry.ab.picture").picture(experiment, log.trajectory(experiment))
        known = {m.name: log.summary(several.derived(experiment, m)) for m in experiment.also}
        metrics = several.compared(experiment, {experiment.metric: summary, **known})
        cuped = None
        if experiment.covariate:
            cuped = several.adjusted(experiment, summary, *map(log.summary, several.streams(experiment)))
    file = importlib.import_module("registry.home").home() / "reports" / f"{experiment.name}.png"
    file.parent.mkdir(exist_ok=True)
    drawn.savefig(file, dpi=110)
    warning = the_store().show_experiment(experiment.name, drawn, decision.evidence())
    text = f"{experiments.describe(experiment, decision)}\n  picture    {file}{f' ({warning})' if warning else ''}"
    text += judged
    more: dict[str, Any] = {}
    if cuped is not None:
        more["cuped"] = asdict(cuped)
        text += f"\n  adjusted   {cuped.effect:+.3f} [{cuped.low:+.3f}, {cuped.high:+.3f}], variance {-cuped.gain:+.0%}"
    if len(metrics) > 1:
        found = several.discoveries({name: r.e_value for name, r in metrics.items()}, experiment.alpha)
        more["metrics"] = {name: {**asdict(r), "differs": name in found} for name, r in metrics.items()}
        for name, r in metrics.items():
            sure = "differs" if name in found else "nothing sure"
            text += (
                f"\n  {name:10} {r.effect:+.3f} [{r.low:+.3f}, {r.high:+.3f}], e-value {r.e_value:.3g}: {sure} (e-BH)"
            )
    if args.html is not None:
        shown = examples(experiment, args.ask or [], args.url)
        pages = importlib.import_module("registry.ab.page")
        history = ledgers.Ledger().history(args.system, 200)
        whole = pages.page(experiment, decision, drawn, history, examples=shown, metrics=metrics, cuped=cuped)
        args.html.write_text(whole)
        text += f"\n  page       {args.html}"
        more["page"] = str(args.html)
    return Says(text, picture=str(file), **decision.evidence(), **more)


def _judged(args: argparse.Namespace) -> str:
    """Have a judge model score the pairs of a shadow experiment at the service; what came of it, as a line."""
    import httpx

    judging = importlib.import_module("registry.ab.judge_model")
    key, token = os.environ.get("PATCHBAY_JUDGE_KEY", ""), os.environ.get("PATCHBAY_JUDGE_TOKEN", "")
    try:
        with httpx.Client(timeout=120) as http:
            found = judging.score(http, args.url, args.judge.rstrip("/"), args.judge_model, key=key, token=token)
    except httpx.HTTPError as e:
        raise NotReady(f"{args.url} or {args.judge} does not answer: {e}") from None
    return f"\n  judge      treatment won {found['won']}, lost {found['lost']}, tied {found['tied']}"


def examples(x: Any, asks: Sequence[str], url: str) -> list[tuple[str, Any, Any]]:
    """What both arms answer to each of `asks` (by the service at `url`), and figures that the store has of both sides.

    Raises NotReady if there are asks and no service answers.
    """
    out: list[tuple[str, Any, Any]] = []
    if asks:
        import httpx

        for ask in asks:
            said = []
            for digest in (x.control, x.treatment):
                model = digest if digest == "base" else f"sha256:{digest}"
                body = {"model": model, "max_tokens": 64, "temperature": 0,
                        "messages": [{"role": "user", "content": ask}]}  # fmt: skip
                try:
                    got = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
                    got.raise_for_status()
                    said.append(got.json()["choices"][0]["message"]["content"])
                except (httpx.HTTPError, ValueError, KeyError) as e:
                    raise NotReady(f"{url} does not answer {ask[:40]!r} as {model[:24]}: {e}") from None
            out.append((ask, *said))
    if x.treatment != "base":
        home = importlib.import_module("registry.home").home()
        try:
            sides = the_store().figures(x.treatment, home / "reports" / "figures")
        except PatchbayError:
            sides = {}
        base, patched = sides.get("base", {}), sides.get("patched", {})
        out += [(name, base.get(name, "not drawn of the base"), patched[name]) for name in sorted(patched)][:12]
    return out


def promote(args: argparse.Namespace) -> Says:
    """make an artifact the champion; running services follow within seconds"""
    ledgers, store = the_ledger(), the_store()
    ref = f"{args.ref}@challenger" if args.ref in SYSTEMS else args.ref
    digest = resolve(ref)
    name = name_of(ref)
    forced = check_digest(name, digest, args.force)  # what cannot be verified here is not promoted
    entry = ledgers.promote(ledgers.Ledger(), name, digest, evidence=forced, who=who())
    text = f"{name}: champion is {short(entry.champion)}.{' Forced; the ledger keeps why.' if forced else ''}"
    return Says(text + mirror(store, name), **asdict(entry))


def rollback(args: argparse.Namespace) -> Says:
    """the champion before this one is the champion again"""
    ledgers = the_ledger()
    entry = ledgers.rollback(ledgers.Ledger(), args.system, who=who())
    return Says(
        f"{args.system}: champion is {short(entry.champion)} again.{mirror(the_store(), args.system)}", **asdict(entry)
    )


def gate(args: argparse.Namespace) -> Says:
    """hold an artifact to what its recipe promises; what has not passed is not promoted"""
    store, ledgers, measuring = the_store(), the_ledger(), importlib.import_module("training.gate")
    rules = importlib.import_module("registry.gate")
    ref = f"{args.ref}@challenger" if args.ref in SYSTEMS else args.ref
    digest = resolve(ref)
    if digest == "base":
        raise NotFound(f"{ref} is the base itself, which promises nothing. Name an artifact: SYSTEM@challenger")
    folder = store.pull(digest)
    name = name_of(ref, folder)
    recipe, promises, dataset = measuring.promises(folder)
    sides = {} if args.again else _known(store, digest, dataset, {p.metric for p in promises} - {rules.LATENCY})
    if not sides:
        got = importlib.import_module("training.run").evaluate(folder, (), args.device)
        sides = got.sides
        figures = {"figures": got.figures["patched"], "base_figures": got.figures["base"]}
        store.push(folder, metrics=sides, dataset=dataset, **figures)
    taken = {rules.LATENCY: measuring.latency(folder, args.device)}
    found = rules.judge(digest, recipe, dataset, promises, {**sides, "patched": {**sides["patched"], **taken}})
    store.log_gate(digest, found.status, found.metrics(), found.evidence())
    ledgers.gate(ledgers.Ledger(), name, found.evidence(), who=who())
    said = Says("\n".join([f"sha256:{digest[:16]} of {recipe}: {found.status}", *map(str, found.verdicts)]),
                **found.evidence()["gate"])  # fmt: skip
    said.status = 0 if found.passed else 1
    return said


def _known(store: Any, digest: str, dataset: tuple[str, str], wanted: set[str]) -> Any:
    """What the store has of an artifact on the data that its recipe names, if all wanted metrics are in it; else {}."""
    try:
        data, sides = store.measured(digest)
    except NotFound:
        return {}
    whole = data == dataset[1] and all(wanted <= sides.get(side, {}).keys() for side in ("base", "patched"))
    return sides if whole else {}


def split_words(words: Sequence[str]) -> tuple[str | None, float, list[str]]:
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
