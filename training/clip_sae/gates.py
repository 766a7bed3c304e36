"""Learned gates: how far to scale down each feature of a dictionary, optimised through the rest of the model.

One gate g_j in [low, 1] per feature scales its activation: x' = x - sum_j (1 - g_j) f_j W_j. On train images, minimise

    CE(hard) - shun * log(1 - p(hard, shunned)) + keep * KL(kept before || kept after) + price * sum_j (1 - g_j)

The terms ask for: right answers in spite of the spurious cue; no mass on the written class, where the right answer is
out of reach; unchanged predictions elsewhere; no feature gated needlessly. Rankings judge features one by one and fail
where features are redundant, and a written word has hundreds. Gates are the only parameters, so the solution can be
read feature by feature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.mechanisms.features import SAE, normalised
from registry.config import STRICT
from training.progress import tqdm


@dataclass(frozen=True)
class GateConfig:
    """Hyperparameters of learned gates."""

    __pydantic_config__ = STRICT

    steps: int = 120
    """Optimiser steps, each on one hard and one kept batch"""
    batch: int = 16
    """Images per batch"""
    lr: float = 0.3
    """Learning rate of Adam on the gates' logits; decays to 0 over the last quarter"""
    keep: float = 20.0
    """Weight of the KL term on kept images"""
    shun: float = 0.0
    """Weight of the penalty on the written class: in half of the attacked images the strip hides the object, and there
    only this term gives the right gradient"""
    price: float = 2e-4
    """Weight of the sparsity term"""
    low: float = -1.0
    """Lower end of the gates' range. Below 0 a feature may be inverted, which cancels what others carry of the same
    cue: a written word is then predicted half as often as with 0, at the same clean accuracy (val)"""
    among: int = 0
    """Number of features that may be gated, those with the largest difference by the spurious cue; 0: all"""
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """A training batch for gates: activations at the site, and the function from them to logits."""

    x: Tensor
    """(n, T, D) activations at the site"""
    logits: Callable[[Tensor], Tensor]
    """(n, T, D) at the site -> (n, C)"""
    label: Tensor
    """(n,) index of the true class"""
    weight: Tensor
    """(n,) weights with mean 1 over all lessons of a kind"""
    shunned: Tensor | None = None
    """(n,) class that should not be predicted: the written one"""


def learn(
    config: GateConfig, sae: SAE, hard: Sequence[Lesson], kept: Sequence[Lesson], tokens: slice = slice(None),
    free: Tensor | None = None, label: str = "gates",
) -> Tensor:  # fmt: skip
    """Optimise the gates (F,), where 1 leaves a feature unchanged.

    tokens: those that are edited; free: (F,) bool, features that may be gated.
    """
    draw = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        before = [lesson.logits(lesson.x).log_softmax(1) for lesson in kept]
    logit = torch.full_like(sae.bias, 3.0).requires_grad_()
    # (F,) gates' range: 1 - low where a feature may be gated, else 0
    span = (1 - config.low) * (torch.ones_like(sae.bias) if free is None else free.to(sae.bias))
    optimizer = torch.optim.Adam([logit], lr=config.lr)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 4 * (1 - n / config.steps)))

    def after(lesson: Lesson) -> Tensor:
        with torch.no_grad():
            f = sae.encode(lesson.x[:, tokens])
        _, scale, _ = normalised(lesson.x[:, tokens], sae.normalise)
        x = lesson.x.clone()
        x[:, tokens] = x[:, tokens] - scale * (
            (span * f * (1 - logit.sigmoid())) @ sae.decoder
        )  # keeps the SAE's error
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
