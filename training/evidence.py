"""What all systems' fits and reports share: opening sealed folders, thumbnails, and results written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches import artifact
from patches.engine.patch import Patch
from patches.evidence import read_evidence
from patches.families.base import Base, load_base
from registry import config as configs
from registry.errors import BadArtifact, ConfigError
from registry.home import home
from registry.manifest import Manifest, digest_of
from registry.measure import Measure
from registry.systems import system

RECIPE = "recipe.json"
"""File in every artifact that names the recipe and the config that made it, so that it can be measured the same way
again"""


@dataclass(frozen=True)
class Recipe:
    """Recipe and config with which an artifact was fitted."""

    name: str
    """Name as `system/recipe`"""
    config: Any
    """Value of the system's own Config class"""


def recipe_of(folder: Path, about: Manifest) -> Recipe:
    """Read the recipe of a verified folder, with its config as a value of the system's Config.

    Raises BadArtifact if it has none, or one that this version does not know.
    """
    if RECIPE not in about.files:
        raise BadArtifact(f"{folder} has no {RECIPE}, so how to measure it is unknown. Fit it again.")
    sealed = json.loads((folder / RECIPE).read_text())
    try:
        return Recipe(sealed["recipe"], configs.parse(system(about.system).load_job().Config, sealed["config"]))
    except ConfigError as e:
        raise BadArtifact(
            f"{folder} was sealed by a version of patchbay whose recipes are others: {e} Measure it with that version, "
            "or fit it again; it is served as it is."
        ) from None


def dataset_of(recipe: Recipe) -> tuple[str, str]:
    """Name and digest (16 hex digits) of the data that a recipe's config chooses to measure on."""
    return recipe.name.replace("/", "-"), digest_of(asdict(recipe.config))[:16]


@dataclass(frozen=True)
class Opened:
    """A sealed patch with its base, ready to be measured."""

    folder: Path
    about: Manifest
    base: Base
    """Base model whose parameters require no gradients"""
    patch: Patch
    fitted: Mapping[str, Any]
    """Evidence sealed by the fit: candidates, the choice, controls"""
    recipe: Recipe


def open_patch(folder: Path, ref: str, device: str = "cpu") -> Opened:
    """Load the patch sealed in `folder` and its base `ref`; every hash is verified. Raises as `artifact.load`."""
    about, patch = artifact.load(folder, device=device)
    base = load_base(ref, system(about.system).family, device)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    base.model.requires_grad_(False)
    return Opened(folder, about, base, patch, read_evidence(folder), recipe_of(folder, about))


def thumbnails(image: Tensor, size: int) -> Tensor:
    """Downscale images (n, 3, h, w) uint8 to (n, 3, size, size) uint8 on the CPU."""
    small = nnf.interpolate(image.float().cpu(), (size, size), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def plain(value: Any) -> Any:
    """Convert results to JSON values; a Measure becomes [value, low, high, n], or its value without an interval."""
    if isinstance(value, Measure):
        if value.low is None or value.high is None:
            return round(float(value.value), 4)
        return [round(float(v), 4) for v in (value.value, value.low, value.high)] + [value.n]
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


class Draft(dict[str, Any]):
    """Results of a long report, a nested dict that is rewritten to disk whenever a part is added (`keep`)."""

    def __init__(self, about: Manifest) -> None:
        super().__init__()
        self.file = home() / "reports" / f"{about.system}-{about.digest[:16]}.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, *path: str, value: Any) -> None:
        """Store a value under a path of keys and rewrite the file."""
        at: dict[str, Any] = self
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
        self.file.write_text(json.dumps(plain(self), indent=1, default=str))


def table(value: Any) -> dict[str, list[Any]]:
    """Flatten nested results into the columns of one table: what, value, low, high, n. Texts go to `value`."""
    columns: dict[str, list[Any]] = {"what": [], "value": [], "low": [], "high": [], "n": []}
    for what, m in _leaves(value):
        cells = (m.value, m.low, m.high, m.n) if isinstance(m, Measure) else (m, None, None, None)
        for name, cell in zip(columns, (what or "value", *cells), strict=True):
            columns[name].append(cell)
    return columns


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for every leaf; a list is one leaf: a Measure if it is one, else its JSON."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*path, str(key)))
    elif isinstance(value, list | tuple):
        yield " / ".join(path), row if (row := _measure(value)) is not None else json.dumps(plain(value), default=str)
    else:
        yield " / ".join(path), value


def _measure(row: Any) -> Measure | None:
    """Parse a row [value, low, high, n] into a Measure; return None for any other list."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in row)
    if len(row) != 4 or not numbers or not isinstance(row[3], int) or not row[1] <= row[0] <= row[2]:
        return None
    return Measure(float(row[0]), float(row[1]), float(row[2]), row[3])
