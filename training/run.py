"""The only driver: fit a recipe into a sealed folder, measure base and patched alike, draw, report in full.

A system gives `Config`, `RECIPES`, `fit(config, folder)` and `evaluate(subject, config, arm)`; it may give
`figures(folder, results)`, one set or {"base": ..., "patched": ...}, and `report(folder, config)`. Everything else
about running is here, once.
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
from registry import manifest
from registry.errors import NotFound
from registry.home import home
from registry.manifest import Manifest
from registry.measure import Measure, measures
from registry.systems import System, system
from training.evidence import RECIPE, recipe_of, table

SIDES = {"base": None, "patched": ONLY}
"""side -> arm of the subject"""


@dataclass(frozen=True)
class Full:
    """A system's whole report of one artifact: with its controls, its baselines, and what else was asked."""

    manifest: Manifest
    tables: dict[str, dict[str, list[Any]]]
    """name -> columns: what, value, low, high, n"""
    figures: dict[str, Any]
    """name -> matplotlib Figure"""


@dataclass(frozen=True)
class Measured:
    """One artifact and its base, by the same metrics on the same data."""

    manifest: Manifest
    sides: dict[str, dict[str, Measure]]
    """"base" and "patched" -> metric -> what was measured"""
    dataset: tuple[str, str]
    """name, digest of the config that chose the data"""
    figures: dict[str, dict[str, Any]]
    """"base" and "patched" -> name -> matplotlib Figure; the same names, for they are shown side by side"""


def recipe(name: str, words: Iterable[str] = ()) -> tuple[System, str, Any]:
    """`system/recipe` with `key=value` words -> (row, recipe name, config). Without a recipe: lab, else tiny."""
    which, _, key = name.partition("/")
    row = system(which)
    recipes = row.load_job().RECIPES
    key = key or next(k for k in ("lab", "smollm", "tiny") if k in recipes)
    if key not in recipes:
        raise NotFound(f"{which} has no recipe {key!r}. Recipes: {', '.join(recipes)}.")
    return row, key, configs.override(recipes[key], words)


def fit(name: str, words: Iterable[str] = ()) -> Path:
    """Run a recipe and seal what it made: home()/runs/<system>-<digest16>. The same recipe gives the same digest."""
    row, key, config = recipe(name, words)
    _seed(getattr(config, "seed", 0))
    runs = home() / "runs"
    runs.mkdir(exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=runs, prefix=".part-"))
    try:
        about = {"recipe": f"{row.name}/{key}", "config": asdict(config)}
        (part / RECIPE).write_bytes(manifest.canonical(json.loads(json.dumps(about))))
        made = row.load_job().fit(config, part)
        folder = runs / f"{row.name}-{made.digest[:16]}"
        if not folder.exists():
            os.replace(part, folder)
        return folder
    finally:
        shutil.rmtree(part, ignore_errors=True)


def evaluate(folder: Path, words: Iterable[str] = (), device: str | None = None) -> Measured:
    """Measure a sealed artifact and its base with the job's own metrics; one model, two arms.

    device: by default the one it was fitted on, which its config names.
    """
    about = manifest.read(folder)
    row = system(about.system)
    job = row.load_job()
    sealed = recipe_of(folder, about)
    config = configs.override(sealed.config, words)
    data = (sealed.name.replace("/", "-"), manifest.digest_of(asdict(config))[:16])
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
    """Everything the system says of a sealed artifact: what its claim in the table of systems comes from.

    Raises NotFound if the system gives no report.
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
    """A config whose data are drawn where the model is. None: where it was fitted."""
    return replace(config, device=device) if device and hasattr(config, "device") else config


def _by_side(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a job drew, for each side: as it says, or one set that shows both and stands on both."""
    if figures.keys() == SIDES.keys():
        return figures
    return {side: figures for side in SIDES}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
