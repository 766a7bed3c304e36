"""The noise schedule of a diffusion model: levels, the variance-preserving coefficients, and what an output means.

At level t a noisy latent is x_t = a_t x_0 + s_t eps with a_t = sqrt(abar_t), s_t = sqrt(1 - abar_t) (DDPM, arXiv
2006.11239). A denoiser predicts eps, v = a eps - s x_0 (arXiv 2202.00512) or x_0; `split` gives x_0 and eps for any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from registry.errors import Invalid, NotFound

SOLVERS = ("ddim", "dpm++", "unipc")
"""few-step solvers any base is sampled with; "" is the one its own pipeline names"""
MAX_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """A scheduler's config in diffusers' form (`scheduler_config.json`), read as numbers."""

    config: Mapping[str, Any]

    @cached_property
    def alphas(self) -> Tensor:
        """(N,) abar_t, float32, as diffusers' DDIMScheduler computes it from the same config."""
        from diffusers import DDIMScheduler

        made: Tensor = DDIMScheduler.from_config(dict(self.config)).alphas_cumprod
        return made

    @property
    def prediction(self) -> str:
        """epsilon, v_prediction or sample"""
        return str(self.config.get("prediction_type", "epsilon"))

    @property
    def clip(self) -> float | None:
        """what |x_0| is clipped to while sampling; None: not at all"""
        return float(self.config.get("clip_sample_range", 1.0)) if self.config.get("clip_sample") else None

    def at(self, t: int | None) -> tuple[float, float]:
        """(a_t, s_t); None is the picture itself, where a = 1 unless the config keeps the first level's."""
        if t is None:
            if self.config.get("set_alpha_to_one", True):
                return 1.0, 0.0
            t = 0
        abar = float(self.alphas[t])
        return abar**0.5, (1.0 - abar) ** 0.5

    def split(self, x: Tensor, out: Tensor, t: int, clip: bool = False) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of a noisy latent x at level t and the denoiser's output for it."""
        a, s = self.at(t)
        if self.prediction == "v_prediction":
            x0, eps = a * x - s * out, s * x + a * out
        elif self.prediction == "epsilon":
            x0, eps = (x - s * out) / max(a, 1e-6), out
        else:
            x0, eps = out, (x - a * out) / max(s, 1e-6)
        if clip and self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
            eps = (x - a * x0) / max(s, 1e-6)
        return x0, eps

    def levels(self, steps: int, top: int | None = None) -> list[int]:
        """`steps` levels, highest first, as the scheduler spaces them; with `top`, evenly spaced from there down to 0.

        Raises Invalid for a number of steps beyond the schedule.
        """
        if not 1 <= steps <= len(self.alphas):
            raise Invalid(f"{steps} steps: a schedule of {len(self.alphas)} levels takes 1 to {len(self.alphas)}.")
        if top is not None:
            return [round(top - i * (top + 1) / steps) for i in range(steps)]
        from diffusers import DDIMScheduler

        made = DDIMScheduler.from_config(dict(self.config))
        made.set_timesteps(steps)
        return [int(t) for t in made.timesteps]

    def stock(self, solver: str, steps: int) -> Any:
        """A fresh diffusers scheduler of this config, set to `steps`. Raises NotFound for an unknown solver."""
        import diffusers

        name = {"ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
        kind = name.get(solver) if solver else str(self.config.get("_class_name", "DDIMScheduler"))
        if kind is None or not kind.endswith("Scheduler") or not hasattr(diffusers, kind):
            raise NotFound(f"There is no solver {solver[:40]!r}. Solvers: {', '.join(SOLVERS)}.")
        more: dict[str, dict[str, Any]] = {
            "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
            "unipc": {"solver_order": 2},
        }
        made = getattr(diffusers, kind).from_config(dict(self.config), **more.get(solver, {}))
        made.set_timesteps(steps)
        return made


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal latents of a seed, drawn on the CPU so that every device starts from the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
