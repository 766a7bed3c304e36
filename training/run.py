"""The only driver of training jobs: fit a recipe into a sealed folder, evaluate base and patched, draw figures, report.

A system's module provides `Config`, `RECIPES`, `fit(config, folder)` and `evaluate(subject, config, arm)`, and
optionally `figures(folder, results)`, which returns one set or {"base": ..., "patched": ...}, and `report(folder,
config)`. Everything else about running jobs is here.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patches.engine.patch import ONLY
from patches.subject import Subject
from registry import config as configs
from registry import manifest, recipes
from registry.errors import NotFound
from registry.home import home, part_prefix, swept
from registry.manifest import Manifest
from registry.measure import Measure, measures
from registry.systems import SYSTEMS, System, system
from training import progress
from training.evidence import RECIPE, dataset_of, recipe_of, table

SIDES = {"base": None, "patched": ONLY}
"""Reported side -> arm of the subject"""


@dataclass(frozen=True)
class Full:
    """A system's full report on one artifact, with controls and baselines."""

    manifest: Manifest
    tables: dict[str, dict[str, list[Any]]]
    """Table name -> columns: what, value, low, high, n"""
    figures: dict[str, Any]
    """Figure name -> matplotlib Figure"""


@dataclass(frozen=True)
class Measured:
    """Metrics of an artifact and of its base on the same data."""

    manifest: Manifest
    sides: dict[str, dict[str, Measure]]
    """"base" and "patched" -> metric -> Measure"""
    dataset: tuple[str, str]
    """Name, and digest of the config that determined the data"""
    figures: dict[str, dict[str, Any]]
    """"base" and "patched" -> name -> matplotlib Figure; names are equal, so that MLflow shows them side by side"""


def recipe(name: str, words: Iterable[str] = ()) -> tuple[System, str, Any]:
    """Resolve `system/recipe` and `key=value` words to (system row, recipe name, config). Default: the usual recipe.

    Raises NotFound for an unknown recipe, ConfigError for bad words.
    """
    row, key, _ = recipes.split(name)
    return row, key, configs.override(row.load_job().RECIPES[key], words)


def fit(name: str, words: Iterable[str] = ()) -> Path:
    """Run a recipe and seal the result in home()/runs/<system>-<digest16>. The same recipe gives the same digest."""
    row, key, config = recipe(name, words)
    progress.say(_announced(row, key, config, not recipes.split(name)[2]))
    _seed(getattr(config, "seed", 0))
    runs = swept(home() / "runs")
    part = Path(tempfile.mkdtemp(dir=runs, prefix=part_prefix()))
    what = f"{row.name}/{key}"
    try:
        about = {"recipe": f"{row.name}/{key}", "config": asdict(config)}
        about = json.loads(json.dumps(about))
        (part / RECIPE).write_bytes(manifest.canonical(about))
        with progress.told(what, f"{what} {getattr(config, 'device', 'cpu')} {manifest.digest_of(about)[:8]}"):
            made = row.load_job().fit(config, part)
        folder = runs / f"{row.name}-{made.digest[:16]}"
        if not folder.exists():
            os.replace(part, folder)
        return folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _announced(row: System, key: str, config: Any, usual: bool) -> str:
    """What is about to be done, on what, and about how long it takes."""
    named = " (its usual recipe; others: patchbay fit --help)" if usual else ""
    about = json.loads(json.dumps({"recipe": f"{row.name}/{key}", "config": asdict(config)}))
    device = getattr(config, "device", "cpu")
    bases = [str(getattr(config, f)) for f in ("base", *row.roles) if getattr(config, f, "")]
    words = [f"base {', '.join(bases) or 'none'}", f"device {device}"]
    words += [f"{name} {count:,}" for name, count in progress.steps(config).items()]
    took = progress.last_time(f"{row.name}/{key} {device} {manifest.digest_of(about)[:8]}")
    said = recipes.offer(row.name).recipes.get(key, "") if row.name in SYSTEMS else ""
    words.append(
        f"took {progress.span(took)} the last time" if took is not None else said or "how long is not known yet"
    )
    return f"fit {row.name}/{key}{named}: {'; '.join(words)}"


def evaluate(folder: Path, words: Iterable[str] = (), device: str | None = None) -> Measured:
    """Measure a sealed artifact and its base with the system's own metrics, as two arms of one model.

    device: by default the one it was fitted on, which its config names.
    """
    about = manifest.read(folder)
    row = system(about.system)
    job = row.load_job()
    sealed = recipe_of(folder, about)
    config = configs.override(sealed.config, words)
    data = dataset_of(replace(sealed, config=config))
    config = _on(config, device)
    given = getattr(config, "base", "") if not row.roles else ""
    model = Subject.load(folder, given or None, str(device or getattr(config, "device", "cpu")))
    try:
        _seed(getattr(config, "seed", 0))
        sides = {side: measures(job.evaluate(model, config, arm)) for side, arm in SIDES.items()}
    finally:
        model.close()
    draw = getattr(job, "figures", None)
    values = {side: {name: m.value for name, m in metrics.items()} for side, metrics in sides.items()}
    figures = _by_side(draw(folder, values)) if draw else _by_side({})
    return Measured(about, sides, data, figures)


def report(folder: Path, words: Iterable[str] = (), device: str | None = None) -> Full:
    """Run a system's full report on a sealed artifact; claims in the table of systems come from it.

    Raises NotFound if the system has no report.
    """
    about = manifest.read(folder)
    job = system(about.system).load_job()
    if not hasattr(job, "report"):
        raise NotFound(f"{about.system} has no report beyond its metrics. Leave --full out.")
    config = _on(configs.override(recipe_of(folder, about).config, words), device)
    _seed(getattr(config, "seed", 0))
    parts = job.report(folder, config)
    drawn = {name: part for name, part in parts.items() if hasattr(part, "savefig")}
    return Full(about, {name: table(part) for name, part in parts.items() if name not in drawn}, drawn)


def _on(config: Any, device: str | None) -> Any:
    """Set the config's device, on which the data are rendered; None keeps the one of the fit."""
    return replace(config, device=device) if device and hasattr(config, "device") else config


def _by_side(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Assign figures to sides: as the system says, or one set to both sides."""
    if figures.keys() == SIDES.keys():
        return figures
    return {side: figures for side in SIDES}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
