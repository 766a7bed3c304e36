"""Turns clips of bytes into what a video model reads: normalised pixels, patches, and which patches are hidden.

Shapes: b clips, T frames, R pixels a side, N = T/2 * (R/P)^2 patches of a tubelet of 2 frames and P pixels, D numbers a
patch. A patch's numbers are in the order of VideoMAE's targets: (frame, row, column, colour).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Generator, Tensor

Still = Literal["keep", "mean", "first", "previous"]
STILLS: tuple[Still, ...] = ("keep", "mean", "first", "previous")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""what transformers' VideoMAE un-normalises its targets with, whatever its processor says"""


def normalise(
    clips: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, still: Still = "keep"
) -> Tensor:  # fmt: skip
    """Normalise bytes (b, T, 3, R, R) to float32 and take away what does not move.

    still: `keep` nothing is taken away; `mean` the clip's mean frame; `first` its first frame; `previous` the frame
    before (the first frame of the clip becomes zeros). The mean frame holds the future, so a model that predicts the
    future must not have it taken away.
    """
    shape = (3, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std], device=clips.device).view(shape)
    x = clips.float() * scale
    match still:
        case "mean":
            return x - x.mean(1, keepdim=True)
        case "first":
            return x - x[:, :1]
        case "previous":
            return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1)
        case _:
            return x - torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=x.device).view(shape)


def patchify(x: Tensor, tubelet: int, patch: int) -> Tensor:
    """(b, T, 3, R, R) -> (b, N, D), raster order in space within each slice of time."""
    b, frames, c, h, w = x.shape
    x = x.view(b, frames // tubelet, tubelet, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 4, 6, 2, 5, 7, 3).reshape(b, -1, tubelet * patch * patch * c)


def unpatchify(x: Tensor, frames: int, size: int, tubelet: int, patch: int) -> Tensor:
    """The inverse of `patchify`: (b, N, D) -> (b, T, 3, R, R)."""
    side = size // patch
    x = x.view(len(x), frames // tubelet, side, side, tubelet, patch, patch, 3)
    return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(len(x), frames, 3, size, size)


def split(
    b: int, slices: int, places: int, ratio: float, g: Generator, mask: Literal["tube", "random"] = "tube"
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose which patches are seen and which are hidden: indices (b, N - M) and (b, M), both ascending.

    tube: the same places are hidden in every slice of time; random: each slice is drawn for itself, evenly over clips.
    Every clip hides the same number of patches, as batches of indices must.
    """
    n = places if mask == "tube" else slices * places
    hidden = round(ratio * n)
    order = torch.rand(b, n, generator=g).argsort(1)
    hide, keep = order[:, :hidden].sort(1).values, order[:, hidden:].sort(1).values
    if mask == "random":
        return keep, hide
    step = torch.arange(slices)[:, None] * places
    return (keep[:, None] + step).flatten(1), (hide[:, None] + step).flatten(1)


def bool_mask(hide: Tensor, n: int) -> Tensor:
    """(b, N) bool, true where hidden: the mask as transformers' VideoMAE takes it."""
    return torch.zeros(len(hide), n, dtype=torch.bool, device=hide.device).scatter_(1, hide, True)
