"""Maps over patches as callers want them: a PNG laid over the picture, run lengths of a mask, or numbers.

All are of the picture as the model sees it: resized and cropped to its input.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from bentos import pictures
from bentos.runtime import Runtime

Format = Literal["png", "rle", "float"]
Threshold = Literal["mean", "0.5", "otsu"]


def told(runtime: Runtime, x: Tensor, heat: Tensor, how: Format, threshold: Threshold) -> dict[str, Any]:
    """heat (rows, columns), any scale, of pixels x (3, H, W). `mask_share` is the share above the threshold."""
    big = nnf.interpolate(heat[None, None].float(), tuple(x.shape[-2:]), mode="bilinear")[0, 0]
    low, high = big.min(), big.max()
    big = ((big - low) / (high - low).clamp_min(1e-12)).cpu()
    at = cut(big, threshold)
    mask = big > at
    out: dict[str, Any] = {"size": list(big.shape), "threshold": at, "mask_share": float(mask.float().mean())}
    if how == "float":
        return out | {"grid": heat.float().cpu().tolist()}
    if how == "rle":
        return out | {"rle": runs(mask)}
    return out | {"png": pictures.png(overlay(seen(runtime, x), big, mask))}


def cut(heat: Tensor, threshold: Threshold) -> float:
    """Where a map (H, W) between 0 and 1 is cut; otsu: where the classes above and below lie farthest apart."""
    if threshold == "mean":
        return float(heat.mean())
    if threshold == "0.5":
        return 0.5
    counts = heat.float().histc(64, 0, 1)
    middles = (torch.arange(64) + 0.5) / 64
    below, mass = counts.cumsum(0), (counts * middles).cumsum(0)
    above = counts.sum() - below
    apart = below * above * (mass / below.clamp_min(1) - (mass[-1] - mass) / above.clamp_min(1)).square()
    return float((int(apart.argmax()) + 1) / 64)


def runs(mask: Tensor) -> list[int]:
    """Lengths of runs row by row, beginning with how many are out (0 if the first is in)."""
    flat = mask.flatten().cpu()
    ends = (flat[1:] != flat[:-1]).nonzero()[:, 0] + 1
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), ends, torch.tensor([len(flat)])])
    return ([0] if bool(flat[0]) else []) + edges.diff().tolist()


def seen(runtime: Runtime, x: Tensor) -> Tensor:
    """(3, H, W) uint8 of pixels as the processor made them."""
    p = runtime.base.processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    out: Tensor = ((x.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return out


def overlay(picture: Tensor, heat: Tensor, mask: Tensor) -> Tensor:
    """(3, H, W) uint8: grey, redder where the map is high, in its own colours inside the mask."""
    image = picture.float()
    grey = image.mean(0, keepdim=True).expand_as(image) * 0.6
    red = torch.stack([255 * heat, 40 * heat, torch.zeros_like(heat)])
    out: Tensor = torch.where(mask, 0.75 * image + 0.25 * red, 0.75 * grey + 0.25 * red)
    return out.round().clamp(0, 255).to(torch.uint8)
