"""Quality of a sparse dictionary: explained variance, sparsity, feature densities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.mechanisms.features import EPS, SAE

BINS = tuple(i / 2 for i in range(-12, 1))
"""Bin edges of the density histogram: log10 of the fraction of tokens on which a feature fires"""


class Quality:
    """Running explained variance, sparsity and densities over batches (B, T, D), by token type."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        F, D = sae.decoder.shape
        self.parts: dict[str, dict[str, Any]] = {
            name: {"n": 0, "error": 0.0, "cos": 0.0, "sum": torch.zeros(D, dtype=torch.double), "square": 0.0, "l0": [],
                   "fired": torch.zeros(F)}
            for name in ("all", "cls", "patches")
        }  # fmt: skip
        self.positions: Tensor | None = None
        self.images = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add a batch x (B, T, D), the class token first."""
        x = x.float()
        f = self.sae.encode(x)
        back = self.sae.decode(f, x)
        on = f > 0
        l0 = on.sum(-1)  # (B, T)
        self.positions = l0.double().sum(0) + (0 if self.positions is None else self.positions)
        self.images += len(x)
        alike = nnf.cosine_similarity(x, back, dim=-1)
        error, size = (x - back).double().square().sum(-1), x.double().square().sum(-1)
        for name, at in (("all", slice(None)), ("cls", slice(0, 1)), ("patches", slice(1, None))):
            p = self.parts[name]
            p["n"] += x[:, at, 0].numel()
            p["error"] += float(error[:, at].sum())
            p["square"] += float(size[:, at].sum())
            p["cos"] += float(alike[:, at].sum())
            p["sum"] += x[:, at].double().sum((0, 1)).cpu()
            p["l0"].append(l0[:, at].flatten().cpu())
            p["fired"] += on[:, at].sum((0, 1)).cpu()

    def result(self) -> dict[str, Any]:
        """Return the statistics per token type, and the mean L0 at every position (T,), the class token first.

        Per type: explained variance, cosine, L0 (mean, median, over D), alive fraction, density histogram.
        """
        out: dict[str, Any] = {}
        D = self.sae.decoder.shape[1]
        for name, p in self.parts.items():
            if not p["n"]:
                continue
            variance = p["square"] - float(p["sum"].square().sum()) / p["n"]
            l0 = torch.cat(p["l0"]).float()
            density = (p["fired"] / p["n"]).clamp_min(1e-12).log10()
            alive = p["fired"] > 0
            inner = torch.tensor([-1e9, *BINS[1:-1], 1e9])
            out[name] = {
                "tokens": p["n"],
                "explained_variance": 1 - p["error"] / max(variance, EPS),
                "cosine": p["cos"] / p["n"],
                "l0_mean": float(l0.mean()),
                "l0_median": float(l0.median()),
                "l0_over_width": float(l0.mean()) / D,
                "alive": float(alive.float().mean()),
                "density": torch.histogram(density[alive], inner)[0].int().tolist(),
            }
        assert self.positions is not None
        out["l0_map"] = (self.positions / self.images).tolist()
        return out


def principal_variance(x: Tensor, components: int) -> float:
    """Compute the variance explained by the first principal components of x (N, D): the baseline for that L0."""
    values = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    return float(values[:components].sum() / values.sum())


def mean_max_cosine(found: Tensor, truth: Tensor) -> float:
    """Compute MMCS: the best cosine with any found direction, averaged over the true directions (rows)."""
    return float((nnf.normalize(truth, dim=1) @ nnf.normalize(found, dim=1).T).amax(1).mean())
