"""A planted dictionary: sparse sums of known directions, and how each method is to find them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import normalize

from training.clip_sae.dictionary import SAEConfig

D, ATOMS, ACTIVE = 64, 64, 3


def planted(seed=0, size=4096):
    """Tokens that are sparse sums of known atoms around a mean, and the atoms."""
    g = torch.Generator().manual_seed(100 + seed)
    atoms = normalize(torch.randn(ATOMS, D, generator=g), dim=1)
    mean = torch.randn(D, generator=g)

    def chunk(number):
        g = torch.Generator().manual_seed(1000 * seed + number)
        on = torch.rand(size, ATOMS, generator=g).topk(ACTIVE, 1).indices
        f = torch.zeros(size, ATOMS).scatter_(1, on, 1 + torch.rand(size, ACTIVE, generator=g))
        return 5.0 * (f @ atoms) + mean + 0.01 * torch.randn(size, D, generator=g)

    return chunk, atoms


SMALL = SAEConfig(features=128, k=ACTIVE, steps=200, batch=1024, warmup=20, dead_after=50, lr=6e-3)
METHODS = {
    "topk": replace(SMALL, method="topk"),
    "batchtopk": replace(SMALL, method="batchtopk"),
    "vanilla": replace(SMALL, method="vanilla", l1=3e-3, steps=400),
}
