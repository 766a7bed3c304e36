"""Diffusion models: bases, the denoising worker, adapters. What other packages use is named here."""

from __future__ import annotations

from patches.families.diffusion.base import LAYOUTS, SITES, Condition, Pipe, Processor, load, wrap
from patches.families.diffusion.schedule import SOLVERS, Schedule
from patches.families.diffusion.worker import Denoiser, Denoising, Invert, Regenerate

__all__ = [
    "LAYOUTS", "SITES", "SOLVERS", "Condition", "Denoiser", "Denoising", "Invert", "Pipe", "Processor", "Regenerate",
    "Schedule", "load", "wrap",
]  # fmt: skip
