"""Where in a picture heads see a text: grids of direct effects, masks, overlays.

CLIP-InterpreT, arXiv 2409.06579: per-head topic maps and contrastive ones (two texts, one difference). Protocol of the
masks: Gandelsman, Efros, Steinhardt, arXiv 2310.05916: bilinear to the picture's size, cut at the map's own mean.
Shapes: B pictures, n texts, g x g patches.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from patches.families.clip.direct import Lens
from registry.errors import Invalid

Threshold = Literal["mean", "half", "otsu"]
"""How a map between 0 and 1 is cut into a mask: at its mean, at 0.5, or where it parts best in two"""
FOR, AGAINST = (0.85, 0.12, 0.12), (0.1, 0.25, 0.9)
"""red and blue, of 1"""


@torch.no_grad()
def grid(lens: Lens, images: Tensor, texts: Tensor, heads: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """(B, n, g, g) what the heads (default all) add to the cosine with each text (n, k) by the patch they read."""
    layers = sorted({layer for layer, _ in heads}) if heads else range(lens.layers)
    maps = lens.maps(images, texts, list(layers))
    said = maps.said / maps.y.norm(dim=1)[:, None, None, None, None]
    if heads is None:
        total = said.sum((1, 2))
    else:
        if len(set(heads)) < len(heads):
            raise Invalid("heads: one is named twice.")
        total = torch.stack([said[:, maps.layers.index(layer), h] for layer, h in heads]).sum(0)
    return _square(lens, total[..., 1:])


@torch.no_grad()
def attention(lens: Lens, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """(B, g, g) the class token's raw attention, mean over heads of `layers` (default the last): what maps are held
    against."""
    k = lens.readout.map.shape[1]
    maps = lens.maps(images, torch.zeros(1, k), [lens.layers - 1] if layers is None else layers)
    return _square(lens, maps.pattern[..., 1:].mean((1, 2)))


def _square(lens: Lens, x: Tensor) -> Tensor:
    """(..., patches) -> (..., rows, columns)."""
    rows, columns = lens.base.model.visual.grid_size
    return x.reshape(*x.shape[:-1], rows, columns)


def scaled(x: Tensor) -> Tensor:
    """Maps (..., h, w) from 0 to 1; a flat one is 0."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def resized(x: Tensor, side: int) -> Tensor:
    """Maps (..., g, g), bilinear to side x side."""
    flat = x.reshape(-1, 1, *x.shape[-2:]).float()
    made = torch.nn.functional.interpolate(flat, (side, side), mode="bilinear", align_corners=False)
    return made.reshape(*x.shape[:-2], side, side)


def mask(x: Tensor, threshold: Threshold, side: int) -> Tensor:
    """(..., side, side) bool of maps (..., g, g)."""
    full = scaled(resized(x, side))
    if threshold == "half":
        return full > 0.5
    if threshold == "mean":
        return full > full.mean((-2, -1), keepdim=True)
    flat = full.reshape(-1, side * side)
    cut = torch.tensor([_otsu(row) for row in flat]).reshape(*full.shape[:-2], 1, 1)
    return full > cut.to(full)


def _otsu(x: Tensor) -> float:
    count = torch.histc(x, 64, 0, 1)
    middle = (torch.arange(64, dtype=torch.float32) + 0.5) / 64
    w = count.cumsum(0)
    m = (count * middle.to(count)).cumsum(0)
    below, above = m / w.clamp_min(1), (m[-1] - m) / (w[-1] - w).clamp_min(1)
    return float((int((w * (w[-1] - w) * (below - above).square()).argmax()) + 1) / 64)


def runs(m: Tensor) -> dict[str, object]:
    """A mask (h, w) as lengths of runs, row by row, the first of them outside (it may be 0)."""
    flat = m.flatten().int()
    edges = (flat.diff() != 0).nonzero()[:, 0] + 1
    at = torch.cat([torch.zeros(1, dtype=torch.long), edges.cpu(), torch.tensor([len(flat)])])
    counts = at.diff().tolist()
    return {"size": list(m.shape), "counts": [0, *counts] if bool(flat[0]) else counts}


def overlay(picture: Tensor, x: Tensor, side: int) -> Tensor:
    """(3, side, side) uint8: the picture (3, h, w) in 0..1, greyed, under its map (g, g): red above zero, blue below,
    the more so the farther; grey where it says nothing."""
    grey = resized(picture.float(), side).clamp(0, 1).mean(0, keepdim=True).expand(3, -1, -1)
    v = resized(x.to(grey), side)
    v = v / v.abs().max().clamp_min(1e-12)
    tint = torch.where(v > 0, grey.new_tensor(FOR)[:, None, None], grey.new_tensor(AGAINST)[:, None, None])
    much = 0.8 * v.abs()
    return (((1 - much) * grey + much * tint) * 255).round().clamp(0, 255).to(torch.uint8)


def drawn(
    picture: Tensor, x: Tensor, threshold: Threshold, side: int, formats: Sequence[Literal["floats", "rle", "png"]]
) -> dict[str, Any]:
    """A map (g, g) of a picture (3, h, w) in 0..1 as an answer tells it: what its mask covers, the rest as asked.

    What is below zero speaks against the text and is never of the mask; in the picture the mask has a white outline.
    """
    cut = mask(x.clamp_min(0), threshold, side)
    out: dict[str, Any] = {"grid": list(x.shape), "covered": float(cut.float().mean())}
    if "floats" in formats:
        out["floats"] = x.tolist()
    if "rle" in formats:
        out["rle"] = runs(cut)
    if "png" in formats:
        shown = overlay(picture, x, side)
        shown[:, outline(cut)] = 255
        out["png"] = png(shown)
    return out


def outline(m: Tensor) -> Tensor:
    """The pixels of a mask (h, w) that touch what is not of it."""
    around = torch.nn.functional.max_pool2d((~m).float()[None], 3, 1, 1)[0]
    return m & around.bool()


def png(picture: Tensor) -> str:
    """A data: URI of (3, h, w) uint8."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
