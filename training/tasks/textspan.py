"""TextSpan: describe attention heads by the texts that span their contributions to the embedding.

Needs second moments of the contributions only.

Gandelsman, Efros, Steinhardt, arXiv 2310.05916, algorithm 1. Per head, with C (N, k) its contributions to N unit
embeddings: project the text pool R (M, k) onto the head's own directions; then repeatedly take the text along which C
varies most, and remove its direction from C and from every text. All of it depends only on n, sum c and sum c c^T, so
images are streamed and the cost of the rest does not grow with their number:

    G = sum c c^T = B' S B,  Z = B (G / n - mu mu^T) B^T,  R' = R B^T
    j = argmax_j R'_j Z R'_j^T,  u = R'_j / |R'_j|,  share = u Z u^T / tr,  Q = 1 - u^T u,  R' <- R' Q,  Z <- Q Z Q

Texts are not renormalised after the projection: a text that lies mostly outside of the head's subspace should not win.
At most `RANK` directions of a head are kept, and only those above rounding error; with `own` means
(`families.clip.direct`) a head of width e has at most e.

Shapes: k joint space, M texts, L layers, H heads, m texts per head, r directions of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patches.families.clip.direct import Lens, Share
from registry.errors import Invalid, NotFound

RANK = 80
"""Number of principal directions kept per head, as published"""
ROUNDING = 1e-6
"""Relative singular value below which a direction is rounding error"""
CONSTANT = 1e-12
"""Variance over second moment below which a head's contribution is constant"""
MAX_TEXTS = 200_000


@dataclass(frozen=True, eq=False)
class HeadMoments:
    """First and second moments of heads' contributions to unit embeddings, accumulated over images."""

    count: int
    """Number of images"""
    sum: Tensor
    """(L, H, k) float64: sum of c"""
    """(L, H, k) float64"""
    square: Tensor
    """(L, H, k, k) float64: sum of c c^T"""
    layers: tuple[int, ...]
    """Layer of each row of `sum` and `square`"""

    @property
    def mean(self) -> Tensor:
        """(L, H, k) mean contribution of each head"""
        return self.sum / self.count

    def covariance(self, layer: int, head: int) -> Tensor:
        """Return a head's covariance (k, k); layer: position in `layers`."""
        mean = self.mean[layer, head]
        return self.square[layer, head] / self.count - torch.outer(mean, mean)


def moments(
    lens: Lens, batches: Iterable[Tensor], layers: Sequence[int], unit: bool = True, share: Share = "own"
) -> HeadMoments:
    """Accumulate moments over batches of preprocessed images (B, 3, h, w).

    unit: contributions to embeddings of unit norm (as published). Memory: L H k^2 doubles, whatever the number of
    images. Raises Invalid for fewer than two.
    """
    lens.check(layers)
    at = list(layers)
    k = lens.readout.map.shape[1]
    total = torch.zeros(len(at), lens.heads, k, dtype=torch.float64, device=lens.base.device)
    square = torch.zeros(len(at), lens.heads, k, k, dtype=torch.float64, device=lens.base.device)
    count = 0
    for x in batches:
        parts = lens.read(x, share=share)
        c = (parts.heads[:, at] / (parts.norm[:, None, None, None] if unit else 1.0)).double()
        total += c.sum(0)
        square += torch.einsum("blhk,blhm->lhkm", c, c)
        count += len(c)
    if count < 2:
        raise Invalid(f"A head's variance needs at least two pictures; there were {count}.")
    return HeadMoments(count, total, square, tuple(at))


@dataclass(frozen=True)
class Span:
    """Texts that span one head's contributions, in the order in which they were taken."""

    layer: int
    head: int
    texts: tuple[int, ...]
    """Rows of the pool"""
    share: tuple[float, ...]
    """Fraction of the head's variance that each text adds"""
    rank: int
    """Number of directions of the head"""
    variance: float
    """Trace of the head's covariance"""
    random: float
    """Fraction of variance explained by as many random texts of the pool: the control for `sum(share)`"""


@torch.no_grad()
def spans(
    seen: HeadMoments, pool: Tensor, count: int = 10, rank: int = RANK, normalise_pool: bool = False, draws: int = 8
) -> list[Span]:
    """Compute the texts of every head from a pool of unit embeddings (M, k); fewer than `count` at low rank.

    normalise_pool: rescale texts to unit norm after projecting them onto the head's directions, so that long ones do
    not win.
    """
    if not 1 <= count <= len(pool):
        raise Invalid(f"count={count}: a pool of {len(pool)} texts gives 1 to {len(pool)} per head.")
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(len(pool), generator=g)[:count] for _ in range(draws)]
    R = pool.double().to(seen.square)
    heads = range(seen.sum.shape[1])
    return [
        _span(seen, n, layer, h, R, count, rank, normalise_pool, drawn)
        for n, layer in enumerate(seen.layers)
        for h in heads
    ]


def basis(square: Tensor, rank: int) -> Tensor:
    """Return the principal directions (r, k) of second moments (k, k), largest first, above rounding error."""
    values, vectors = torch.linalg.eigh(square)
    kept = min(rank, int((values > ROUNDING**2 * values[-1].clamp_min(1e-300)).sum()))
    kept_vectors: Tensor = vectors[:, len(values) - kept :].flip(1).T
    return kept_vectors


def _span(
    seen: HeadMoments, n: int, layer: int, head: int, R: Tensor, count: int, rank: int, normalise: bool,
    drawn: Sequence[Tensor],
) -> Span:  # fmt: skip
    B = basis(seen.square[n, head], rank)
    covariance = seen.covariance(n, head)
    Z = B @ covariance @ B.T
    R = R @ B.T  # (M, r)
    if normalise:
        R = torch.nn.functional.normalize(R, dim=1)
    total = float(covariance.trace())
    if total <= CONSTANT * float(seen.square[n, head].trace() / seen.count) or not len(B):
        return Span(layer, head, (), (), len(B), max(total, 0.0), 0.0)
    chance = 0.0
    for rows in drawn:
        Q = torch.linalg.qr(R[rows].T)[0]
        chance += float((Q.T @ Z @ Q).trace()) / total / len(drawn)
    texts: list[int] = []
    share: list[float] = []
    least = 1e-9 * float(R.square().sum(1).max())
    while len(texts) < min(count, len(B)):
        worth = ((R @ Z) * R).sum(1)
        worth[R.square().sum(1) <= least] = -1.0  # exhausted texts: only rounding error is left of them
        j = int(worth.argmax())
        if float(worth[j]) <= 0:
            break
        u = R[j] / R[j].norm()
        texts.append(j)
        share.append(float(u @ Z @ u) / total)
        R = R - torch.outer(R @ u, u)
        half = Z - torch.outer(u, u @ Z)
        Z = half - torch.outer(half @ u, u)
    return Span(layer, head, tuple(texts), tuple(share), len(B), total, chance)


def read_pool(file: str | Path) -> tuple[str, ...]:
    """Read a text pool from a .txt file, one text a line, stripped, without empty or repeated lines.

    Raises NotFound or Invalid.
    """
    path = Path(file).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        raise NotFound(f"There is no pool of texts {path}. Give a .txt with one text a line.")
    try:
        lines = tuple(dict.fromkeys(x for line in path.read_text("utf-8").splitlines() if (x := line.strip())))
    except UnicodeDecodeError as e:
        raise Invalid(f"{path.name} is not UTF-8 ({e.reason} at byte {e.start}).") from None
    if not 2 <= len(lines) <= MAX_TEXTS:
        raise Invalid(f"{path.name} has {len(lines)} different texts; a pool has 2 to {MAX_TEXTS}.")
    return lines
