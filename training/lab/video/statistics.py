"""Frame statistics of clips by which the stages of the synthetic progression are compared.

The paper correlates accuracy with frame similarity to natural clips (FID), diversity, the spectrum's exponent and
colour distance. Inception weights are not available offline, so features come from a fixed random convolution: the
numbers rank stages of this lab and are not in the paper's units.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor


def statistics(video: Tensor, natural: Tensor) -> dict[str, float]:
    """Compute statistics of clips (n, T, 3, R, R) uint8, some relative to natural clips.

    change: mean |difference| of neighbouring frames, 0 to 255; black: fraction of black pixels; distance: Frechet
    distance of random features to the natural ones; diversity: log-determinant of those features' covariance; spectrum:
    alpha of amplitude ~ 1 / f^alpha; colour: symmetric Kullback-Leibler divergence of 3-D Gaussians of the colours.
    """
    frames, other = _frames(video), _frames(natural)
    a, b = _features(frames), _features(other)
    delta = (video[:, 1:].float() - video[:, :-1].float()).abs().mean()
    return {
        "change": round(float(delta), 3),
        "black": round(float((video.amax(2) == 0).float().mean()), 4),
        "distance": round(frechet(a, b), 4),
        "diversity": round(float(torch.logdet(_covariance(a))), 3),
        "spectrum": round(spectrum(frames), 4),
        "colour": round(colour(frames, other), 4),
    }


def _frames(video: Tensor, count: int = 512) -> Tensor:
    """Sample frames (m, 3, R, R) in [0, 1] from all clips."""
    flat = video.flatten(0, 1)
    step = max(1, len(flat) // count)
    return flat[::step][:count].float() / 255


@lru_cache(1)
def _filters() -> Tensor:
    return torch.randn(24, 3, 5, 5, generator=Generator().manual_seed(0)) / 75**0.5


def _features(x: Tensor) -> Tensor:
    """Compute features (m, 48): mean and deviation over positions of 24 rectified random filters."""
    y = nnf.conv2d(x - 0.5, _filters(), padding=2).relu()
    return torch.cat([y.mean((2, 3)), y.std((2, 3))], 1).double()


def _covariance(x: Tensor) -> Tensor:
    return x.T.cov() + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype)


def frechet(a: Tensor, b: Tensor) -> float:
    """Compute the Frechet distance of Gaussians fitted to features (n, d).

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2).
    """
    s, t = _covariance(a), _covariance(b)
    # tr sqrt(S S') is the sum of the square roots of the eigenvalues of S S', which are real
    root = torch.linalg.eigvals(s @ t).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root)


def spectrum(x: Tensor) -> float:
    """Fit the exponent alpha of log amplitude against log frequency, over radial bins."""
    size = x.shape[-1]
    grey = x.mean(1) - x.mean((1, 2, 3))[:, None, None]
    amplitude = torch.fft.rfft2(grey).abs().mean(0)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)
    radius = (fy**2 + fx**2).sqrt()
    keep = (radius > 0) & (radius <= 0.5)
    bins = (radius[keep] * size).round().long()
    level = torch.stack([amplitude[keep][bins == b].mean() for b in bins.unique()])
    f = torch.log(bins.unique().float())
    design = torch.stack([f, torch.ones_like(f)], 1)
    slope = torch.linalg.lstsq(design, torch.log(level.clamp_min(1e-9))[:, None]).solution[0, 0]
    return float(-slope)


def colour(x: Tensor, y: Tensor) -> float:
    """Compute the symmetric Kullback-Leibler divergence of Gaussians over the colours of two sets of frames."""
    a, b = (v.permute(0, 2, 3, 1).reshape(-1, 3)[::7].double() for v in (x, y))
    m, n = a.mean(0), b.mean(0)
    s, t = (v.T.cov() + 1e-5 * torch.eye(3, dtype=torch.float64) for v in (a, b))
    si, ti = torch.linalg.inv(s), torch.linalg.inv(t)
    d = m - n
    return float(0.5 * ((ti @ s).trace() + (si @ t).trace() - 6 + d @ (si + ti) @ d) / 2)
