"""The full report: the sealed search on test beside its baselines at equal calls, and how fast it is beside the
published loop."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patches.engine.patch import ONLY
from patches.families.search.config import SearchConfig
from patches.subject import Search, Subject
from registry import config as configs
from registry import manifest
from registry.measure import Measure
from training.evidence import Draft
from training.mils import measure
from training.mils.config import Config
from training.tasks.captions import objects
from training.tasks.intervals import mean

OFFICIAL_ITEMS = 1
"""items of the published loop, which takes one after the other"""


def report(folder: Path, config: Config) -> dict[str, Any]:
    """On config.items of test: the best line of the bank, random lines and mutation at as many scorer calls, the search
    itself, with a patch on the scorer the same without it; paired differences in F1; both loops' pace."""
    about = manifest.read(folder)
    search = configs.parse(SearchConfig, about.config)
    arms = {ONLY: search, "random": replace(search, generator="random")}
    if search.generator != "mutation":
        arms["mutation"] = replace(search, generator="mutation")
    if search.patched:
        arms["unpatched"] = replace(search, patched=())
    subject = Subject.load(folder, device=config.device)
    for name, other in arms.items():
        if name != ONLY:
            subject.add(name, Search(asdict(other), folder))
    draft = Draft(about)
    task = measure.task_of(config, subject.bases["scorer"], "test", config.items)
    f1: dict[str, list[float]] = {}
    for name in ("bank", *arms):
        arm, strength = (ONLY, 0.0) if name == "bank" else (name, 1.0)
        done = measure.run(subject, task, arm, strength)
        draft.keep(
            "test",
            name,
            value={
                **measure.metrics(done),
                **measure.spent(done),
                "seconds_an_item": Measure(done.seconds / len(task.inputs), n=len(task.inputs)),
            },
        )
        f1[name] = [objects(t, true, task.names).f1 for t, true in zip(done.texts, task.true, strict=True)]
        if name == ONLY:
            by_round = {k: measure.metrics(done, done.texts_at(k))["target/f1"] for k in range(search.steps + 1)}
            draft.keep("f1_by_round", value=by_round)
            draft.keep("examples", value=[list(pair) for pair in zip(done.texts[:8], task.true[:8], strict=True)])
        if name != "bank":
            draft.keep("f1_minus_bank", name, value=mean([a - b for a, b in zip(f1[name], f1["bank"], strict=True)]))
    subject.close()
    draft.keep("pace", value=pace(folder, config))
    return draft


def pace(folder: Path, config: Config, n: int = OFFICIAL_ITEMS) -> dict[str, Measure]:
    """Captions a minute of the same search in both loops, in one process, each with nothing encoded before."""
    search = configs.parse(SearchConfig, manifest.read(folder).config)
    out = {}
    for how in ("official", "shared"):
        subject = Subject.load(folder, device=config.device)
        subject.add("timed", Search(asdict(replace(search, how=how)), folder))
        many = n if how == "official" else max(n, min(config.items, 8 * n))
        task = measure.task_of(config, subject.bases["scorer"], "test", many)
        done = measure.run(subject, task, "timed")
        out[how] = Measure(60 * many / done.seconds, n=many, better="higher")
        subject.close()
    return {**out, "ratio": Measure(out["shared"].value / out["official"].value, n=n, better="higher")}
