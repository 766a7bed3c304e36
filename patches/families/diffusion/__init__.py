"""Diffusion models: pipelines of Stable Diffusion's, Stable unCLIP's and Kandinsky's class and the lab's own;
denoising rows, inversions, adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patches.adapters import Adapter, read_adapter, truncated, write_adapter
from patches.families.base import Base
from patches.families.diffusion.asked import LEVELS, changed, drawn, levels, png, predict, prepare
from patches.families.diffusion.base import (
    LAYOUTS,
    SITES,
    Condition,
    Pipe,
    Processor,
    dtype_of,
    knows,
    load,
    parts,
    wrap,
)
from patches.families.diffusion.inversion import METHODS
from patches.families.diffusion.schedule import SOLVERS, Schedule
from patches.families.diffusion.table import TABLE
from patches.families.diffusion.worker import Denoiser, Denoising, Edit, Invert, Regenerate
from patches.families.family import Family

if TYPE_CHECKING:  # layouts are loaded by name; whoever follows imports to pack what runs finds them here
    from patches.families.diffusion import faces, kandinsky, lab, stable, unclip  # noqa: F401

__all__ = [
    "FAMILY", "LAYOUTS", "LEVELS", "METHODS", "SITES", "SOLVERS", "Adapter", "Condition", "Denoiser", "Denoising",
    "Edit", "Invert", "Pipe", "Processor", "Regenerate", "Schedule", "changed", "drawn", "levels", "load", "png",
    "prepare", "read_adapter", "truncated", "wrap", "write_adapter",
]  # fmt: skip


def tiny(seed: int = 0) -> Base:
    """A random model of 16 px in the lab's layout: text states and an image embedding."""
    from patches.families.diffusion import small as made

    return made.tiny(seed)


def _purpose(name: str) -> Base:
    from patches.families.diffusion import small as made

    base: Base = getattr(made, name)()
    return base


FAMILY = Family(
    name="diffusion",
    load=load,
    tiny=tiny,
    worker=Denoiser,
    table=TABLE,
    predict=predict,
    example="lab:diffusion",
    purposes={
        "stable": lambda: _purpose("stable"),
        "unclip": lambda: _purpose("unclip"),
        "kandinsky": lambda: _purpose("kandinsky"),
        "faces": lambda: _purpose("faces"),
    },
    sites=SITES,
    dtype=dtype_of,
    parts=parts,
    knows=knows,
)
