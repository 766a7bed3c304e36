"""Fitting: search for val items, choose the number of rounds, seal it with bank, patch, sound model and trace."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from patches import artifact
from patches.engine.patch import ONLY
from patches.evidence import write_evidence
from patches.families.base import Base, load_base
from patches.families.family import family
from patches.families.search import bank as banks
from patches.families.search.config import SearchConfig, Task
from patches.subject import Search, Subject
from registry import manifest
from registry.errors import NotFound
from registry.manifest import Manifest
from training.mils import measure, sounds
from training.mils.config import Config
from training.mils.draw import editor
from training.mils.items import lines

TRACE = "trace.jsonl"
SOUND = "sound"
"""folder of the audio-text model that a fit trained"""
WITHIN = 0.005
"""fewer rounds are taken if F1 on val is at most so much below the best"""
TASKS: dict[str, Task] = {
    "scenes": "image", "typographic": "image", "company": "image", "sounds": "audio", "clips": "video",
    "prompts": "prompt", "styles": "style", "plus": "arithmetic", "minus": "arithmetic", "both": "arithmetic",
}  # fmt: skip


def fit(config: Config, folder: Path) -> Manifest:
    """Search for val items, choose the number of rounds by F1 (of drawing tasks: by the judge) on val, seal what was
    found."""
    bases = {
        "scorer": load_base(config.scorer, "clip", config.device),
        "generator": load_base(config.language, "llm", config.device),
    }
    bank = banks.read(Path(config.bank)) if config.bank else banks.bank(lines(config))
    (folder / banks.FILE).write_text("\n".join(bank.lines) + "\n", "utf-8")
    search, parents = configured(config, folder, bases["scorer"])
    subject = Subject(bases, {ONLY: Search(asdict(search), folder)}, family("search"))
    try:
        task = measure.task_of(config, bases["scorer"], "val", config.fit_items)
        done = measure.run(subject, task, ONLY)
    finally:
        subject.close()
    write_trace(done, folder / TRACE)
    curve = [sum(v) / len(v) for v in (measure.worth(done, done.texts_at(k)) for k in range(search.steps + 1))]
    chosen = next((k for k, f in enumerate(curve) if f >= max(curve) - WITHIN and k > 0), search.steps)
    found = {
        "val_items": config.fit_items, "val_f1_by_round": [round(f, 4) for f in curve], "rounds": chosen,
        "val_score_by_round": scores(done), "trace": done.digest, "texts": done.texts_at(chosen),
    }  # fmt: skip
    write_evidence(folder, found)
    return manifest.write(
        folder, kind="search", system="mils", bases={role: b.label for role, b in bases.items()},
        config=asdict(replace(search, steps=chosen)), parents=parents,
    )  # fmt: skip


def configured(config: Config, folder: Path, scorer: Base) -> tuple[SearchConfig, list[str]]:
    """The search with its task, and with the patch and the sound model that are copied or trained into `folder`; the
    digests of what it was made from."""
    search = replace(config.search, seed=config.seed, task=TASKS[config.data])
    parents = []
    if config.patch:
        source = sealed(config.patch)
        about, _ = artifact.load(source, base=scorer.digest)
        shutil.copytree(source, folder / "scorer")
        search, parents = replace(search, patched=("scorer",)), [about.digest]
    if config.data in ("sounds", "both"):
        search = replace(search, sound=ears(config, folder))
    if config.data == "styles" and not config.renderer:
        search = replace(search, renderer=editor().save(folder))
    if config.renderer:
        search = replace(search, renderer=load_base(config.renderer, "diffusion", config.device).label)
    return search, parents


def sealed(reference: str) -> Path:
    """Find the folder of an artifact: a path, or a reference in the store. Raises NotFound for what means the base."""
    if Path(reference).is_dir():
        return Path(reference)
    from registry import store
    from registry.ab.ledger import BASE, Ledger

    if (digest := store.resolve(reference, Ledger())) == BASE:
        raise NotFound(f"{reference} is the base itself, which has no patch. Name a folder, or SYSTEM@challenger.")
    return Path(store.pull(digest))


def ears(config: Config, folder: Path) -> str:
    """name@digest of the audio-text model; the lab's is trained here and sealed with the search."""
    if config.sound:
        return load_base(config.sound, "search", config.device).label
    sounds.train(folder / SOUND, config.sound_steps, seed=config.seed)
    return f"sealed:{SOUND}@{load_base(f'local-dir:{folder / SOUND}', 'search').digest}"


def write_trace(done: measure.Run, file: Path) -> None:
    """Every candidate of every item with score, round and parents' hash, one record a line, without clocks."""
    with file.open("w") as out:
        for i, trace in enumerate(done.traces):
            for record in trace:
                plain = {k: v for k, v in record.items() if k != "seconds"}
                out.write(json.dumps({"item": i, **plain}, separators=(",", ":")) + "\n")


def scores(done: measure.Run) -> list[float]:
    """The best score after every round, mean over items."""
    curves = [job.item.track.curve() for job in done.jobs if job.item is not None and job.item.track is not None]
    rounds = max(map(len, curves))
    return [round(sum(c[min(k, len(c) - 1)] for c in curves) / len(curves), 6) for k in range(rounds)]
