"""Probe heads on frozen video features: a mean or a learned attention over tokens, then a linear layer.

A probe is a plain module with plain weights, so that the one that was trained is the one that is sealed and served.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["mean", "attention"]


class Probe(nn.Module):
    """Reads class scores (b, C) out of features (b, N, d).

    mean: average over tokens, batch norm without weights, linear layer (the linear probe). attention: q learned
    queries weigh the tokens by softmax, the q pooled vectors go through the linear layer (the attentive probe).
    """

    def __init__(self, width: int, classes: int, pooling: Pooling = "attention", queries: int = 4) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02) if pooling == "attention" else None
        self.out = nn.Linear(width * (queries if pooling == "attention" else 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.query is None:
            pooled = self.norm(x.mean(1))
        else:
            x = self.norm(x.flatten(0, 1)).view_as(x)
            weight = (x @ self.query.T).softmax(1)  # (b, N, q)
            pooled = (weight.transpose(1, 2) @ x).flatten(1)
        scores: Tensor = self.out(pooled)
        return scores
