"""Principal components of a population's z-scored adapters, without ever holding all of it in memory.

Two routes to the same space: the Gram matrix of N models (exact, for small N; the oracle), and randomised subspace
iteration over blocks of rows (Halko, Martinsson, Tropp, arXiv 0909.4061), whose memory is (d + N) (m + oversample)
numbers. The z-scoring is implicit: X~ Omega = X (Omega / sd) - 1 ((mean / sd) Omega).

Shapes: N models, d numbers of one adapter, m components, l = m + oversample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from registry.errors import ConfigError

Blocks = Callable[[], Iterator[Tensor]]
"""each call runs over the rows (n, d) of the population once more, in the same order"""
GRAM_LIMIT = 8192
"""models up to which their Gram matrix is formed"""


@dataclass(frozen=True)
class Components:
    """The space: mean and standard deviation of every number, components, and how much each of them holds."""

    mean: Tensor
    """(d,)"""
    sd: Tensor
    """(d,) unbiased; 1 where all models agree"""
    basis: Tensor
    """(d, m) orthonormal"""
    std: Tensor
    """(m,) of the population's coefficients, unbiased"""
    share: Tensor
    """(m,) of the z-scored variance in the first 1, 2, ... components"""
    count: int

    def encode(self, theta: Tensor) -> Tensor:
        """theta (n, d) -> coefficients in standard deviations (n, m)."""
        return ((theta - self.mean) / self.sd) @ self.basis / self.std


def moments(blocks: Blocks) -> tuple[Tensor, Tensor, int]:
    """mean (d,), sd (d,) with ddof 1 and 0 where all models agree, N, in one pass of merged blocks (Chan et al.).

    Raises ConfigError for N < 3.
    """
    n, mean, square = 0, None, None
    for x in blocks():
        k, (m, s) = len(x), _block_moments(x)
        if mean is None or square is None:
            n, mean, square = k, m, s
            continue
        delta = m - mean
        square += s + delta.square() * (n * k / (n + k))
        mean += delta * (k / (n + k))
        n += k
    if n < 3 or mean is None or square is None:
        raise ConfigError(f"A population of {n} has no directions; make one of three models or more.")
    sd = (square / (n - 1)).sqrt()
    # a number all models agree on has no spread beyond rounding: dividing by that would make rounding a component
    flat = sd <= 1e-7 * mean.abs().clamp(min=1e-12)
    return mean.float(), torch.where(flat, torch.zeros_like(sd), sd).float(), n


def _block_moments(x: Tensor, columns: int = 1024) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations (d,) of a block (n, d) in float64, by columns, which stay in the cache."""
    means, squares = [], []
    for part in x.split(columns, 1):
        wide = part.double()
        means.append(wide.mean(0))
        squares.append((wide - means[-1]).square().sum(0))
    return torch.cat(means), torch.cat(squares)


def fit(
    blocks: Blocks, m: int, *, route: str = "auto", oversample: int = 0, power: int = 2, seed: int = 0
) -> Components:
    """The first m components. route: `gram`, `randomised`, or by N. Raises ConfigError for m beyond N - 1."""
    mean, spread, n = moments(blocks)
    sd = torch.where(spread > 0, spread, torch.ones_like(spread))
    if not 1 <= m < n:
        raise ConfigError(f"{m} components of {n} models: at most {n - 1} exist.")
    if route not in ("auto", "gram", "randomised"):
        raise ConfigError(f"There is no route {route[:40]!r}. Routes: gram, randomised, auto.")
    if route == "gram" or (route == "auto" and n <= GRAM_LIMIT):
        basis, s = gram(blocks, mean, sd, m)
    else:
        basis, s = randomised(blocks, mean, sd, m, oversample or max(10, m // 10), power, seed)
    if bool((s <= 1e-6 * s[0]).any()):
        raise ConfigError(f"Only {int((s > 1e-6 * s[0]).sum())} of {m} components have any spread; ask for fewer.")
    # a z-scored number has variance 1 by its own sd, or none where all models agree: no pass is needed to add them up
    total = (n - 1) * int((spread > 0).sum())
    share = (s.double().square().cumsum(0) / total).float()
    return Components(mean, sd, basis, s / (n - 1) ** 0.5, share, n)


def gram(blocks: Blocks, mean: Tensor, sd: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(d, m) components and (m,) singular values through the N x N matrix of inner products, in float64."""
    x = torch.cat([(block - mean) / sd for block in blocks()])  # N is small here: float32 rows, float64 products
    inner = torch.zeros(len(x), len(x), dtype=torch.float64)
    for columns in x.split(4096, 1):
        wide = columns.double()
        inner.addmm_(wide, wide.T)
    values, u = torch.linalg.eigh(inner)
    s = values.flip(0)[:m].clamp(min=0).sqrt()
    mix = u.flip(1)[:, :m] / s.clamp(min=1e-12)
    basis = torch.cat([columns.double().T @ mix for columns in x.split(4096, 1)])
    return basis.float(), s.float()


def randomised(
    blocks: Blocks, mean: Tensor, sd: Tensor, m: int, oversample: int, power: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(d, m) components and (m,) singular values in 2 + 2 power passes, after the one of `moments`.

    Memory is (d + N) (m + oversample) floats, and one block.
    """
    d, ell = len(mean), m + oversample
    omega = torch.randn(d, ell, generator=Generator().manual_seed(seed))
    for _ in range(power):
        q = torch.linalg.qr(_times(blocks, mean, sd, omega)).Q
        omega = torch.linalg.qr(_transposed(blocks, mean, sd, q)).Q
    q = torch.linalg.qr(_times(blocks, mean, sd, omega)).Q  # (N, l)
    b = _transposed(blocks, mean, sd, q)  # (d, l): X~^T Q
    # the small side by its Gram matrix in float64, so that no second d x l array is needed
    values, w = torch.linalg.eigh((b.T @ b).double())
    s = values.flip(0)[:m].clamp(min=0).sqrt()
    basis = b @ (w.flip(1)[:, :m] / s.clamp(min=1e-12)).float()
    return basis, s.float()


def _times(blocks: Blocks, mean: Tensor, sd: Tensor, omega: Tensor) -> Tensor:
    """X~ Omega (N, l)"""
    scaled = omega / sd[:, None]
    shift = mean @ scaled
    return torch.cat([x @ scaled - shift for x in blocks()])


def _transposed(blocks: Blocks, mean: Tensor, sd: Tensor, q: Tensor) -> Tensor:
    """X~^T Q (d, l)"""
    out = torch.zeros(len(mean), q.shape[1])
    at = 0
    for x in blocks():
        part = q[at : at + len(x)]
        out.addmm_(x.T, part)
        at += len(x)
    out -= mean[:, None] * q.sum(0)
    return out.div_(sd[:, None])
