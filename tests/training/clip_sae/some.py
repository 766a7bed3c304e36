"""What tests of clip_sae share."""

from __future__ import annotations

import torch

from patches.mechanisms.features import SAE
from training.clip_sae import RECIPES

TINY = RECIPES["tiny"]
D, F = 32, 60


def some_sae(seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    return SAE(W, 0.2 * torch.randn(F, generator=g), W, torch.zeros(D))
