"""Samplers as programs: a generator that asks for denoiser outputs and ends with latents.

A program yields a `Query`, a few noisy latents with their levels, and is sent the denoiser's output for them. So it
never sees a batch: the worker runs the queries of all rows in one forward, and rows that need different solvers,
levels or numbers of evaluations share it. Every program here works on one row, in float32 on the CPU or wherever its
latents lie.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from patches.families.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Query:
    """Latents x (n, c, h, w) at levels t (n numbers), whose outputs (n, c, h, w) a program waits for."""

    x: Tensor
    t: Sequence[float]
    guided: bool = True
    """False: the row's own condition alone, whatever its guidance"""
    patched: bool = True
    """False: what the row's arm starts from answers, which is the base unless the arm was tuned; inversion asks so"""


Program = Generator[Query, Tensor, Tensor]


def ddim(schedule: Schedule, x: Tensor, levels: Sequence[int], clip: bool = True) -> Program:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12 with eta = 0) from levels[0] down to the picture.

    The next level is the schedule's own, not t - N // steps, so any number of steps ends where it should.
    """
    for t, to in pairwise([*levels, None]):
        assert t is not None
        x0, eps = schedule.split(x, (yield Query(x[None], [t]))[0], t, clip)
        a, s = schedule.at(to)
        x = a * x0 + s * eps
    return x


def stock(
    schedule: Schedule, x: Tensor, solver: str, steps: int, skip: int = 0, seed: int = 0, start: Tensor | None = None
) -> Program:
    """diffusers' own scheduler, one instance a row: DPM-Solver++ (arXiv 2211.01095), UniPC (2302.04867) or the
    pipeline's.

    x: standard normal noise (c, h, w). start: a picture's latents, noised to the level after `skip` steps instead.
    """
    scheduler = schedule.stock(solver, steps)
    if start is not None:
        if skip and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skip)
        x = scheduler.add_noise(start[None], x[None], scheduler.timesteps[skip : skip + 1])
    else:
        x = x[None] * float(scheduler.init_noise_sigma)
    takes = inspect.signature(scheduler.step).parameters
    more: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}
    for t in scheduler.timesteps[skip:]:
        out = yield Query(scheduler.scale_model_input(x, t), [float(t)])
        x = scheduler.step(out, t, x, **more).prev_sample
    return x[0]


def ddpm(schedule: Schedule, x: Tensor, levels: Sequence[int], noises: Tensor) -> Program:
    """DDIM with eta = 1 and given noises (steps, c, h, w): the way down of edit-friendly inversion (arXiv
    2304.06140)."""
    for i, (t, to) in enumerate(pairwise([*levels, None])):
        assert t is not None
        x0, eps = schedule.split(x, (yield Query(x[None], [t]))[0], t)
        mean, sigma = posterior(schedule, x0, eps, t, to)
        x = mean + (sigma or 1.0) * noises[i]
    return x


def posterior(schedule: Schedule, x0: Tensor, eps: Tensor, t: int, to: int | None) -> tuple[Tensor, float]:
    """Mean and standard deviation of x_to given x_t, with eta = 1 (DDIM, eq. 16)."""
    (a, s), (a2, s2) = schedule.at(t), schedule.at(to)
    variance = (s2 / s) ** 2 * max(0.0, 1.0 - (a / a2) ** 2)
    direction = max(0.0, s2**2 - variance) ** 0.5
    return a2 * x0 + direction * eps, variance**0.5
