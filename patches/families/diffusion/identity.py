"""Find the point of a weight space that draws one picture: coefficients alone are fitted, never the weights.

    min over z of  mean over t, eps of | out - out_theta(z)(x_t, t, condition) |^2  +  prior |z|^2

Dravid et al., arXiv 2406.09413, section 4.3, with three changes: z is in standard deviations, so one learning rate
suits all components; the prior is the Gaussian the space was measured with; each step sees several noise levels.
Shapes: K pictures at once, R noise levels a step, m components, d numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from patches.adapters import Adapter
from patches.engine.patch import ONLY, Applied, apply
from patches.families.diffusion.schedule import Schedule
from patches.mechanisms.subspace import AdapterSet, AdapterSetConfig, SubspaceEdit
from registry.errors import Invalid

Forward = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""(x (K R, c, h, w), t (K R,), conditions (K R, ...), theta (K, d)) -> the denoiser's output, differentiable"""
Conditions = Callable[[int, Generator], Mapping[str, Tensor]]
"""(rows a picture, generator) -> conditions (K rows, ...) of this step"""


@dataclass(frozen=True)
class Inversion:
    """How long and how freely coefficients are fitted to one picture."""

    steps: int = 100
    rows: int = 8
    """noise levels a step, spread over the schedule"""
    lr: float = 0.1
    prior: float = 2e-4
    """weight of |z|^2: a point far out costs more than it explains"""
    warm: bool = True
    """begin at the ridge regression's guess instead of the mean"""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 2000 or not 1 <= self.rows <= 64:
            raise Invalid(f"{self.steps} steps of {self.rows} levels: an inversion takes 1 to 2000 of 1 to 64.")


def denoising_target(schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, what the denoiser should answer) for x0 (n, ...) at levels t (n,): eps, v or x_0 as the schedule says."""
    kept = schedule.alphas.to(x0.device)[t].reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    want = {"v_prediction": a * noise - s * x0, "epsilon": noise, "sample": x0}[schedule.prediction]
    return a * x0 + s * noise, want


def spread(groups: int, rows: int, g: Generator, top: int = 1000) -> Tensor:
    """(groups * rows,) levels; the rows of a group lie in different parts of the schedule."""
    at = (torch.arange(rows)[None] + torch.rand(groups, rows, generator=g)) / rows
    return (at * top).long().clamp(max=top - 1).flatten()


def invert(
    space: SubspaceEdit, schedule: Schedule, forward: Forward, latents: Tensor, conditions: Conditions,
    how: Inversion = Inversion(), mask: Tensor | None = None,
    on_step: Callable[[int, float, Tensor], Any] = lambda step, loss, z: None,
) -> Tensor:  # fmt: skip
    """(K, m) coefficients of the pictures with latents (K, c, h, w); each picture is fitted by itself.

    mask: (K, 1 or c, h, w), 0 where the picture is not looked at. on_step(step, mean loss, z) may raise to stop.
    """
    k, g, latents = len(latents), Generator().manual_seed(how.seed), latents.cpu()
    space = space.on("cpu")  # coefficients are few; only the denoiser's work is worth a device
    begin = space.warm(latents) if how.warm else latents.new_zeros(k, space.components)
    z = begin.detach().clone().requires_grad_(True)
    opt = torch.optim.Adam([z], how.lr, betas=(0.9, 0.99))
    x0 = latents.repeat_interleave(how.rows, 0)
    look = None if mask is None else mask.expand_as(latents).repeat_interleave(how.rows, 0)
    for step in range(how.steps):
        opt.param_groups[0]["lr"] = how.lr * (1 - 0.9 * step / how.steps)
        t = spread(k, how.rows, g, len(schedule.alphas))
        noise = torch.randn(x0.shape, generator=g)
        x, want = denoising_target(schedule, x0, t, noise)
        with torch.enable_grad():
            error = (forward(x, t, conditions(how.rows, g), space.decode(z)) - want).square()
            each = (error if look is None else error * look).flatten(1).mean(1).view(k, how.rows).mean(1)
            opt.zero_grad()
            (each.sum() + how.prior * z.square().sum()).backward()
        opt.step()
        on_step(step + 1, float(each.mean().detach()), z.detach())
    return z.detach()


def _asked(pipe: Any, x: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's answer on the device of x, wherever the model is."""
    device = next(pipe.parameters()).device
    told = {k: v.to(device) for k, v in conditions.items()}
    out: Tensor = pipe(sample=x.to(device), timestep=t.to(device), **told)
    return out.to(x.device)


def served(applied: Applied, pipe: Any, arm: str, space: SubspaceEdit) -> Forward:
    """A forward through an arm that serves others at the same time: rows are told their own adapter."""

    def forward(x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        each = len(x) // len(theta)
        told = [space.row(row) for row in theta for _ in range(each)]
        with applied.rows([arm] * len(x), params=told):
            return _asked(pipe, x, t, conditions)

    return forward


def adapter(space: SubspaceEdit, z: Tensor | None = None, rank: int = 0) -> Adapter:
    """A point of the space as a plain adapter of the denoiser: `write_adapter` makes what peft and diffusers load."""
    return Adapter({site.removeprefix("denoiser."): pair for site, pair in space.factors(z, rank).items()})


def alone(pipe: Any, space: SubspaceEdit) -> tuple[Forward, Applied]:
    """A forward through a base that nobody else uses, and what takes the adapters off again."""
    device = next(pipe.parameters()).device
    held: dict[str, Tensor] = {"theta": space.tensors["mean"].float()[None].to(device)}
    on = apply(pipe, {ONLY: AdapterSet(AdapterSetConfig(space.config.layers, space.config.scale), held)})

    def forward(x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        held["theta"] = theta.to(device)
        return _asked(pipe, x, t, conditions)

    return forward, on
