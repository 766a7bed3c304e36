"""From a picture to the noise that makes it: five inversions as programs, each with its own way down.

DDIM and fixed point end in one latent that `solvers.ddim` takes down. Edit-friendly noise, EDICT and O-BELM carry
more than one latent, stacked along the first dimension of what they return; `down` takes each of them down again
under another condition. Levels are the schedule's, highest first, and must stay below the last one where it is pure
noise (a = 0). Inversion runs on what the row's arm starts from (the base, or a tuned one), under the row's own
condition without guidance; the way down is guided and patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from patches.families.diffusion.schedule import Schedule
from patches.families.diffusion.solvers import Program, Query, ddim, ddpm, posterior
from registry.errors import NotFound

METHODS = ("fixed_point", "ddim", "edit_friendly", "edict", "o_belm")
MIX = 0.93
"""p of EDICT (arXiv 2211.12446): how much of a chain stays its own"""


def up(
    schedule: Schedule, method: str, x: Tensor, levels: Sequence[int], iterations: int = 3, seed: int = 0
) -> Program:
    """The state at levels[0] that gives the latent x (c, h, w) back. Raises NotFound for an unknown method.

    Returns (c, h, w) for fixed_point and ddim, (2, c, h, w) for edict and o_belm, (2 levels, c, h, w) for
    edit_friendly.
    """
    if method == "fixed_point":
        return fixed_point(schedule, x, levels, iterations)
    if method == "ddim":
        return fixed_point(schedule, x, levels, 1)
    if method == "edit_friendly":
        return edit_friendly(schedule, x, levels, seed)
    if method == "edict":
        return edict_up(schedule, x, levels)
    if method == "o_belm":
        return belm_up(schedule, x, levels)
    raise NotFound(f"There is no inversion {method[:40]!r}. Inversions: {', '.join(METHODS)}.")


def edited(
    schedule: Schedule, method: str, x: Tensor, levels: Sequence[int], iterations: int = 3, seed: int = 0, skip: int = 0
) -> Program:
    """A picture's latent x up and down again in one program: what a row's arm, condition and guidance make of it."""
    state = yield from up(schedule, method, x, levels, iterations, seed)
    return (yield from down(schedule, method, state, levels, skip))


def down(schedule: Schedule, method: str, state: Tensor, levels: Sequence[int], skip: int = 0) -> Program:
    """The latent (c, h, w) that `state` (of `up`) gives under the row's condition.

    skip: of edit_friendly alone, how many of the noisiest levels are left out (a smaller change).
    """
    if method == "edit_friendly":
        count = len(levels)
        return ddpm(schedule, state[skip], levels[skip:], state[count + skip :])
    if method == "edict":
        return edict_down(schedule, state, levels)
    if method == "o_belm":
        return belm_down(schedule, state, levels)
    return ddim(schedule, state, levels, clip=False)


def fixed_point(schedule: Schedule, x: Tensor, levels: Sequence[int], iterations: int = 3) -> Program:
    """DDIM inversion, each step solved by fixed-point iteration (AIDI, arXiv 2309.04907); 1 iteration is plain DDIM.

    Solves x = step(y, out(y, t), t -> to) for y, starting at y = x.
    """
    for t, to in pairwise([None, *reversed(levels)]):
        assert to is not None
        y = x
        (a, s), (a2, s2) = schedule.at(to), schedule.at(t)
        for _ in range(iterations):
            out = (yield Query(y[None], [to], guided=False, patched=False))[0]
            _, eps = schedule.split(y, out, to)
            y = a * (x - s2 * eps) / a2 + s * eps
        x = y
    return x


def edit_friendly(schedule: Schedule, x: Tensor, levels: Sequence[int], seed: int) -> Program:
    """The noise space of arXiv 2304.06140: independent noisy versions of the picture, then the noises between them.

    All levels are one query, so this is one batched forward. Returns (2 L, c, h, w): the L noisy latents x_t, highest
    level first, then the L noises z_t that lead from each to the next.
    """
    random = torch.Generator().manual_seed(seed)
    a = torch.tensor([schedule.at(t)[0] for t in levels])[:, None, None, None]
    s = torch.tensor([schedule.at(t)[1] for t in levels])[:, None, None, None]
    noisy = a * x + s * torch.randn((len(levels), *x.shape), generator=random)
    out = yield Query(noisy, [float(t) for t in levels], guided=False, patched=False)
    noises = torch.zeros_like(noisy)
    for i, (t, to) in enumerate(pairwise([*levels, None])):
        assert t is not None
        x0, eps = schedule.split(noisy[i], out[i], t)
        mean, sigma = posterior(schedule, x0, eps, t, to)
        # the last step has no noise in DDPM; what its estimate misses is kept, or few levels would not give the
        # picture back
        noises[i] = ((x if to is None else noisy[i + 1]) - mean) / (sigma or 1.0)
    return torch.cat([noisy, noises])


def edict_up(schedule: Schedule, x: Tensor, levels: Sequence[int]) -> Program:
    """EDICT (arXiv 2211.12446): two chains that invert each other exactly, mixed with p = MIX. Returns (2, c, h, w)."""
    x, y = x, x
    for t, to in pairwise([None, *reversed(levels)]):
        assert to is not None
        (a, s), (a2, s2) = schedule.at(to), schedule.at(t)
        k = a2 / a
        b = s2 - k * s
        y = (y - (1 - MIX) * x) / MIX
        x = (x - (1 - MIX) * y) / MIX
        y = (y - b * schedule.split(x, (yield Query(x[None], [to], guided=False, patched=False))[0], to)[1]) / k
        x = (x - b * schedule.split(y, (yield Query(y[None], [to], guided=False, patched=False))[0], to)[1]) / k
    return torch.stack([x, y])


def edict_down(schedule: Schedule, state: Tensor, levels: Sequence[int]) -> Program:
    """The way down of `edict_up`; the first chain is the picture."""
    x, y = state
    for t, to in pairwise([*levels, None]):
        assert t is not None
        (a, s), (a2, s2) = schedule.at(t), schedule.at(to)
        k = a2 / a
        b = s2 - k * s
        x = k * x + b * schedule.split(y, (yield Query(y[None], [t]))[0], t)[1]
        y = k * y + b * schedule.split(x, (yield Query(x[None], [t]))[0], t)[1]
        x = MIX * x + (1 - MIX) * y
        y = MIX * y + (1 - MIX) * x
    return x


def belm_up(schedule: Schedule, x: Tensor, levels: Sequence[int]) -> Program:
    """O-BELM (arXiv 2410.07273): a two-step scheme that is undone exactly, one evaluation a level. Returns (2, c, h,
    w): the latents at levels[0] and levels[1].

    In xbar = x / a, with h_i = sbar_i - sbar_(i-1) and r = h_i / h_(i+1):
    xbar_(i-1) = r^2 xbar_(i+1) + (1 - r^2) xbar_i - h_i (1 + r) eps(x_i). The first step is DDIM's.
    """
    steps = [None, *reversed(levels)]
    sbar = [schedule.at(t)[1] / schedule.at(t)[0] for t in steps]
    before = x
    a, _ = schedule.at(steps[1])
    eps = schedule.split(
        x, (yield Query(x[None], [float(steps[1] or 0)], guided=False, patched=False))[0], steps[1] or 0
    )[1]
    now = a * (x + (sbar[1] - sbar[0]) * eps)
    for i in range(1, len(steps) - 1):
        t = steps[i]
        assert t is not None
        eps = schedule.split(now, (yield Query(now[None], [t], guided=False, patched=False))[0], t)[1]
        h, after = sbar[i] - sbar[i - 1], sbar[i + 1] - sbar[i]
        r = h / after
        bar, bar_before = now / schedule.at(t)[0], before / schedule.at(steps[i - 1])[0]
        new = (bar_before - (1 - r**2) * bar + h * (1 + r) * eps) / r**2
        before, now = now, schedule.at(steps[i + 1])[0] * new
    return torch.stack([now, before])


def belm_down(schedule: Schedule, state: Tensor, levels: Sequence[int]) -> Program:
    """The way down of `belm_up`."""
    steps = [None, *reversed(levels)]
    sbar = [schedule.at(t)[1] / schedule.at(t)[0] for t in steps]
    after, now = state
    for i in range(len(steps) - 2, 0, -1):
        t = steps[i]
        assert t is not None
        eps = schedule.split(now, (yield Query(now[None], [t]))[0], t)[1]
        h = sbar[i] - sbar[i - 1]
        r = h / (sbar[i + 1] - sbar[i])
        bar, bar_after = now / schedule.at(t)[0], after / schedule.at(steps[i + 1])[0]
        new = r**2 * bar_after + (1 - r**2) * bar - h * (1 + r) * eps
        after, now = now, schedule.at(steps[i - 1])[0] * new
    return now
