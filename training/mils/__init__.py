"""mils: captions, prompts and arithmetic without training (Ashutosh et al., arXiv 2501.18096).

The claim: a language model that only proposes and a scorer that only ranks describe pictures, clips and sounds they
were never trained to describe. Here it is a number: exact objects on scenes of two things, for the best line of a fixed
bank, for random lines at as many scorer calls, for mutation without a language model, and for the language model.

    patchbay fit mils/lab                  # seals a configuration with the bank, the trace of 12 val items and a curve
    patchbay eval runs/mils-...            # base (the best line of the bank) beside the search, 100 test scenes
    patchbay eval runs/mils-... --full     # baselines at equal calls, typographic pictures, how=official
    patchbay fit mils/typographic patch=clip_sae@champion      # the scorer carries a patch
    patchbay fit mils/video | audio | prompt | style | arithmetic | minus | both | smollm

What a fit finds is how long to search: scores rise for as long as one looks, right objects do not, because a scorer has
blind spots; the rounds with the best F1 on val are sealed. docs/log/mils.md has what was tried.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patches import artifact
from patches.engine.patch import ONLY
from patches.families.base import Base, load_base
from patches.families.search import bank as banks
from patches.families.search.config import SearchConfig
from patches.subject import Search, Subject
from registry import config as configs
from registry import manifest
from registry.errors import ConfigError
from registry.manifest import Manifest
from registry.measure import Measure
from training.mils import measure, sounds
from training.mils.config import RECIPES, Config
from training.mils.items import Task, lines

__all__ = ["RECIPES", "Config", "evaluate", "figures", "fit", "report"]

TRACE, EVIDENCE = "trace.jsonl", "evidence.json"
SOUND = "sound"
"""folder of the audio-text model that a fit trained"""
WITHIN = 0.005
"""fewer rounds are taken if F1 on val is at most so much below the best"""


def fit(config: Config, folder: Path) -> Manifest:
    """Search for val items, choose the number of rounds, seal configuration, bank, patch and trace."""
    search = replace(config.search, seed=config.seed)
    bases = {"scorer": load_base(config.scorer, "clip", config.device)}
    bases["generator"] = load_base(config.language, "llm", config.device)
    (folder / banks.FILE).write_text("\n".join(_bank(config).lines) + "\n", "utf-8")
    parents = []
    if config.patch:
        source = _sealed(config.patch)
        about, _ = artifact.load(source, base=bases["scorer"].digest)
        shutil.copytree(source, folder / "scorer")
        search, parents = replace(search, patched=("scorer",)), [about.digest]
    if config.data in ("sounds", "both"):
        search = replace(search, sound=_ears(config, folder))
    if config.data in ("sounds", "clips", "prompts", "styles"):
        task = {"sounds": "audio", "clips": "video", "prompts": "prompt", "styles": "style"}[config.data]
        search = replace(search, task=task)  # type: ignore[arg-type]
    elif config.data in ("plus", "minus", "both"):
        search = replace(search, task="arithmetic")
    subject = Subject(bases, {ONLY: Search(asdict(search), folder)}, _family())
    try:
        done = measure.run(subject, measure.task_of(config, bases["scorer"], "val", config.fit_items), ONLY)
    finally:
        subject.close()
    curve = [measure.metrics(done, done.texts_at(k))["f1"].value for k in range(search.steps + 1)]
    chosen = next((k for k, f in enumerate(curve) if f >= max(curve) - WITHIN and k > 0), search.steps)
    with (folder / TRACE).open("w") as out:
        for i, trace in enumerate(done.traces):
            for record in trace:
                plain = {k: v for k, v in record.items() if k != "seconds"}
                out.write(json.dumps({"item": i, **plain}, separators=(",", ":")) + "\n")
    evidence = {
        "val_items": config.fit_items, "val_f1_by_round": [round(f, 4) for f in curve], "rounds": chosen,
        "val_score_by_round": _scores(done), "trace": done.digest, "texts": done.texts_at(chosen),
    }  # fmt: skip
    (folder / EVIDENCE).write_bytes(manifest.canonical(evidence))
    search = replace(search, steps=chosen)
    return manifest.write(
        folder, kind="search", system="mils", bases={role: b.label for role, b in bases.items()},
        config=asdict(search), parents=parents,
    )  # fmt: skip


def evaluate(subject: Subject, config: Config, arm: str | None) -> dict[str, float | Measure]:
    """The search on the test split; arm None: the same with no round, which is the best line of the same bank."""
    task = measure.task_of(config, subject.bases["scorer"], "test", config.items)
    done = measure.run(subject, task, ONLY, strength=0.0 if arm is None else 1.0)
    return {**measure.metrics(done), **measure.spent(done)}


def figures(folder: Path, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    from training.mils.figures import drawn

    return drawn(folder, results)


def report(folder: Path, config: Config) -> Any:
    from training.mils.report import written

    return written(folder, config)


def _bank(config: Config) -> banks.Bank:
    return banks.read(Path(config.bank)) if config.bank else banks.bank(lines(config))


def _sealed(reference: str) -> Path:
    if Path(reference).is_dir():
        return Path(reference)
    from registry import store

    return Path(store.pull(reference))


def _ears(config: Config, folder: Path) -> str:
    """name@digest of the audio-text model; the lab's is trained here and sealed with the search."""
    if config.sound:
        return load_base(config.sound, "search", config.device).label
    sounds.train(folder / SOUND, config.sound_steps, seed=config.seed)
    base = load_base(f"local-dir:{folder / SOUND}", "search")
    return f"sealed:{SOUND}@{base.digest}"


def _family() -> Any:
    from patches.families.family import family

    return family("search")


def _scores(done: measure.Run) -> list[float]:
    curves = [job.item.track.curve() for job in done.jobs if job.item is not None and job.item.track is not None]
    rounds = max(map(len, curves))
    return [round(sum(c[min(k, len(c) - 1)] for c in curves) / len(curves), 6) for k in range(rounds)]
