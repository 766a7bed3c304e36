"""Draw pictures with many adapters at once, for measurement: DDIM in large batches, each adapter with its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patches.engine.patch import ONLY, apply
from patches.mechanisms.subspace import START, AdapterSet, AdapterSetConfig, Layer, split
from training.lab.faces import Judge


@torch.no_grad()
def draw(
    pipe: Any, layers: Sequence[Layer], scale: float, theta: Tensor | None, text: Tensor, noise: Tensor, *,
    guidance: float, steps: int, both: bool = False, chunk: int = 24, early: Tensor | None = None, after: int = START,
) -> Tensor:  # fmt: skip
    """Pictures (n, 3, H, W) of n rows; adapter i of theta (K, d) draws the i-th run of n / K rows; None: the base.

    text (n, L, C), noise (n, c, h, w). both: the null half of guidance goes through the adapter too, as in the paper;
    by default it is the unpatched base. early (K, d): other adapters above the level `after` (delayed injection).
    """
    k = 1 if theta is None else len(theta)
    each = len(text) // k
    device = next(pipe.parameters()).device
    text, noise, null = text.to(device), noise.to(device), pipe.null()["text"].to(device)
    theta = None if theta is None else theta.to(device)
    begun = theta if early is None else early.to(device)
    if theta is None or begun is None:
        parts = [(None, None, t, x) for t, x in zip(text.split(chunk * 4), noise.split(chunk * 4), strict=True)]
    else:
        rows = chunk * each
        parts = list(zip(theta.split(chunk), begun.split(chunk), text.split(rows), noise.split(rows), strict=True))
    made = [pipe.pictures(_denoise(pipe, layers, scale, *p, null, guidance, steps, both, after)).cpu() for p in parts]
    return torch.cat(made)


def _denoise(
    pipe: Any, layers: Sequence[Layer], scale: float, theta: Tensor | None, early: Tensor | None, text: Tensor,
    x: Tensor, null: Tensor, guidance: float, steps: int, both: bool, after: int,
) -> Tensor:  # fmt: skip
    """DDIM; rows are doubled as (own, null)."""
    n, levels = len(x), pipe.schedule.levels(steps)
    condition = torch.cat([text, null.expand_as(text)])
    names = [ONLY] * n + [ONLY if both else None] * n
    held: dict[str, Tensor] = {}
    arms = {} if theta is None else {ONLY: AdapterSet(AdapterSetConfig(tuple(layers), scale), held)}
    with apply(pipe, arms) as on:
        for t, to in zip(levels, [*levels[1:], None], strict=True):
            if theta is not None and early is not None:
                own_theta = early if t > after else theta
                held["theta"] = torch.cat([own_theta, own_theta]) if both else own_theta
            level = torch.full((2 * n,), float(t), device=x.device)
            with on.rows(names if theta is not None else [None] * (2 * n)):
                own, other = pipe(sample=torch.cat([x, x]), timestep=level, text=condition).chunk(2)
            x0, eps = pipe.schedule.split(x, other + guidance * (own - other), t)
            a, s = pipe.schedule.at(to)
            x = a * x0 + s * eps
    return x


def joined(
    layers: Sequence[Layer], one: Tensor, other: Tensor, weight: float | Tensor = 1.0
) -> tuple[tuple[Layer, ...], Tensor]:
    """Two adapters as one of both ranks: the sum of their updates, the second times `weight` (K,) or a number."""
    out, layered = [], []
    w = weight[:, None, None] if isinstance(weight, Tensor) else weight
    for layer, (a1, b1), (a2, b2) in zip(layers, split(layers, one), split(layers, other), strict=True):
        a, b = torch.cat([a1, a2.expand_as(a1)], -2), torch.cat([b1, w * b2.expand_as(b1)], -1)
        layered.append(Layer(layer.site, tuple(a.shape[1:]), tuple(b.shape[1:])))
        out += [a.flatten(1), b.flatten(1)]
    return tuple(layered), torch.cat(out, 1)


def read(judge: Judge, image: Tensor, each: int) -> Tensor:
    """(K, each, 9) attributes of pictures (K * each, ...)."""
    said: Tensor = judge.read(image).unflatten(0, (-1, each))
    return said


def retrieve(said: Tensor, people: Tensor) -> Tensor:
    """(n,) rank of each row's own person among `people` (n, k) by distance of standardised attributes; 0 is found."""
    sd = people.std(0).clamp(min=0.1)
    d = torch.cdist(said / sd, people / sd)
    return (d < d.diagonal()[:, None]).sum(1)
