"""Learned gates: how far each feature of a dictionary is to be taken away, found through the rest of the model.

One gate g_j in [low, 1] per feature scales its activation: x' = x - sum_j (1 - g_j) f_j W_j. On train pictures,

    CE(hard) - shun * log(1 - p(hard, shunned)) + keep * KL(kept before || kept after) + price * sum_j (1 - g_j)

is made small: right answers where the thing that should not matter is in the way, not what it says where a right answer
is out of reach, unchanged answers elsewhere, and no feature closed for nothing. Rankings judge features one by one;
features that stand in for each other fool them, and a written word has hundreds. The gates are the only parameters, so
what is learned can be read feature by feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from patches.mechanisms.features import SAE, normalised
from registry.config import STRICT


@dataclass(frozen=True)
class GateConfig:
    """Hyperparameters of learned gates."""

    __pydantic_config__ = STRICT

    steps: int = 120
    """Optimiser steps, of one hard and one kept batch each"""
    batch: int = 16
    """pictures"""
    lr: float = 0.3
    """Adam's, on the logits of the gates; falls to nought over the last quarter"""
    keep: float = 20.0
    shun: float = 0.0
    """Weight of lessons that name what is not to be said: half of the attacked pictures are covered by their strip, and
    there
    only this tells a gate that it is right"""
    price: float = 2e-4
    low: float = -1.0
    """the least a gate may be. Below 0 a feature may be turned round, which takes away what others carry of the same
    thing: a written word is then named half as often as with 0, at the same clean accuracy (val)"""
    among: int = 0
    """only so many features are gated, those that differ most with what should not matter; 0: all"""
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A training batch for gates: activations at the site, and the function from them to logits."""

    x: Tensor
    """(n, T, D)"""
    logits: Callable[[Tensor], Tensor]
    """(n, T, D) at the site -> (n, C)"""
    label: Tensor
    """(n,)"""
    weight: Tensor
    """(n,) of mean 1 over all lessons of a kind"""
    shunned: Tensor | None = None
    """(n,) what is not to be said: the written class"""


def learn(
    config: GateConfig, sae: SAE, hard: Sequence[Lesson], kept: Sequence[Lesson], tokens: slice = slice(None),
    free: Tensor | None = None, label: str = "gates",
) -> Tensor:  # fmt: skip
    """(F,) gates: 1 leaves a feature as it is. tokens: the ones that are edited; free: (F,) bool, what may be gated."""
    draw = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        before = [lesson.logits(lesson.x).log_softmax(1) for lesson in kept]
    logit = torch.full_like(sae.bias, 3.0).requires_grad_()
    # (F,) from open to as far as a gate may go
    span = (1 - config.low) * (torch.ones_like(sae.bias) if free is None else free.to(sae.bias))
    optimizer = torch.optim.Adam([logit], lr=config.lr)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 4 * (1 - n / config.steps)))

    def after(lesson: Lesson) -> Tensor:
        with torch.no_grad():
            f = sae.encode(lesson.x[:, tokens])
        _, scale, _ = normalised(lesson.x[:, tokens], sae.normalise)
        x = lesson.x.clone()
        x[:, tokens] = x[:, tokens] - scale * ((span * f * (1 - logit.sigmoid())) @ sae.decoder)  # all the rest is kept
        return lesson.logits(x)

    bar = tqdm(range(config.steps), label, disable=None, leave=False)
    for _ in bar:
        i, j = (int(torch.randint(len(kind), (1,), generator=draw)) for kind in (hard, kept))
        optimizer.zero_grad()
        with torch.enable_grad():
            said = after(hard[i])
            wrong = nnf.cross_entropy(said, hard[i].label, reduction="none")
            if config.shun and (shunned := hard[i].shunned) is not None:
                p = said.softmax(1).gather(1, shunned[:, None])[:, 0]
                wrong = wrong - config.shun * torch.log1p(-p.clamp(max=1 - 1e-6))
            wrong = wrong @ hard[i].weight / len(hard[i].x)
            drift = nnf.kl_div(after(kept[j]).log_softmax(1), before[j], log_target=True, reduction="batchmean")
            closed = (span * (1 - logit.sigmoid())).sum()
            (wrong + config.keep * drift + config.price * closed).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
        told = {"hard": wrong, "drift": drift, "closed": closed}
        bar.set_postfix({k: f"{float(v.detach()):.3g}" for k, v in told.items()})
    return 1 - span * (1 - logit.detach().sigmoid())
