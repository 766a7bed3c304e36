"""The only driver: fit a recipe into a sealed folder, measure base and patched alike, draw, push.

A job gives `Config`, `RECIPES`, `fit(config, folder)` and `evaluate(model, config, arm)`; it may give
`figures(folder, results)`. Everything else about running is here, once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patches.engine.patch import ONLY
from patches.subject import Subject
from registry import config as configs
from registry import manifest
from registry.errors import BadArtifact, NotFound
from registry.home import home
from registry.manifest import Manifest
from registry.measure import Measure, measures
from registry.systems import System, system

RECIPE = "recipe.json"
"""lies in every artifact: which recipe made it, with which config, so that it can be measured the same way again"""


SIDES = {"base": None, "patched": ONLY}
"""side -> arm of the subject"""


@dataclass(frozen=True)
class Measured:
    """One artifact and its base, by the same metrics on the same data."""

    manifest: Manifest
    sides: dict[str, dict[str, Measure]]
    """"base" and "patched" -> metric -> what was measured"""
    dataset: tuple[str, str]
    """name, digest of the config that chose the data"""
    figures: dict[str, Any]
    """name -> matplotlib Figure"""


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


def evaluate(folder: Path, words: Iterable[str] = (), device: str = "cpu") -> Measured:
    """Measure a sealed artifact and its base with the job's own metrics; one model, two arms."""
    about = manifest.read(folder)
    row = system(about.system)
    job = row.load_job()
    if RECIPE not in about.files:
        raise BadArtifact(f"{folder} has no {RECIPE}, so how to measure it is unknown. Fit it again.")
    sealed = json.loads((folder / RECIPE).read_text())
    config = configs.override(configs.parse(job.Config, sealed["config"]), words)
    given = getattr(config, "base", "") if not row.roles else ""
    model = Subject.load(folder, given or None, device)
    try:
        _seed(getattr(config, "seed", 0))
        sides = {side: measures(job.evaluate(model, config, arm)) for side, arm in SIDES.items()}
    finally:
        model.close()
    draw = getattr(job, "figures", None)
    values = {side: {name: m.value for name, m in metrics.items()} for side, metrics in sides.items()}
    figures = draw(folder, values) if draw else {}
    data = (sealed["recipe"].replace("/", "-"), manifest.digest_of(asdict(config))[:16])
    return Measured(about, sides, data, figures)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
