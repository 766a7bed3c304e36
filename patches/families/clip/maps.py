"""Heat maps of where heads see a text in an image: grids of direct contributions, masks, overlays.

CLIP-InterpreT, arXiv 2409.06579: per-head topic maps and contrastive ones (two texts, one difference). Masks as in
Gandelsman, Efros, Steinhardt, arXiv 2310.05916: bilinear resize, then a threshold at the map's own mean. Shapes: B
images, n texts, g x g patches.
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
"""Threshold that turns a map scaled to [0, 1] into a mask: its mean, 0.5, or Otsu's"""
FOR, AGAINST = (0.85, 0.12, 0.12), (0.1, 0.25, 0.9)
"""Red for positive, blue for negative values, RGB in [0, 1]"""


@torch.no_grad()
def grid(lens: Lens, images: Tensor, texts: Tensor, heads: Sequence[tuple[int, int]] | None = None) -> Tensor:
    """Compute contributions of heads (default all) to the cosine with texts (n, k), by source patch: (B, n, g, g)."""
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
    """Return the class token's raw attention (B, g, g), averaged over heads of `layers` (default the last)."""
    k = lens.readout.map.shape[1]
    maps = lens.maps(images, torch.zeros(1, k), [lens.layers - 1] if layers is None else layers)
    return _square(lens, maps.pattern[..., 1:].mean((1, 2)))


def _square(lens: Lens, x: Tensor) -> Tensor:
    """Arrange patches on their grid: (..., patches) -> (..., rows, columns)."""
    rows, columns = lens.base.model.visual.grid_size
    return x.reshape(*x.shape[:-1], rows, columns)


def scaled(x: Tensor) -> Tensor:
    """Rescale maps (..., h, w) to [0, 1]; a constant one becomes 0."""
    low, high = x.amin((-2, -1), keepdim=True), x.amax((-2, -1), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def resized(x: Tensor, side: int) -> Tensor:
    """Resize maps (..., g, g) bilinearly to (..., side, side)."""
    flat = x.reshape(-1, 1, *x.shape[-2:]).float()
    made = torch.nn.functional.interpolate(flat, (side, side), mode="bilinear", align_corners=False)
    return made.reshape(*x.shape[:-2], side, side)


def mask(x: Tensor, threshold: Threshold, side: int) -> Tensor:
    """Threshold maps (..., g, g) into masks (..., side, side) bool."""
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
    """Run-length encode a mask (h, w) row by row; the first run is outside of it (and may be 0)."""
    flat = m.flatten().int()
    edges = (flat.diff() != 0).nonzero()[:, 0] + 1
    at = torch.cat([torch.zeros(1, dtype=torch.long), edges.cpu(), torch.tensor([len(flat)])])
    counts = at.diff().tolist()
    return {"size": list(m.shape), "counts": [0, *counts] if bool(flat[0]) else counts}


def overlay(picture: Tensor, x: Tensor, side: int) -> Tensor:
    """Overlay a map (g, g) on a greyed image (3, h, w) in [0, 1]: (3, side, side) uint8, red above zero, blue below."""
    grey = resized(picture.float(), side).clamp(0, 1).mean(0, keepdim=True).expand(3, -1, -1)
    v = resized(x.to(grey), side)
    v = v / v.abs().max().clamp_min(1e-12)
    tint = torch.where(v > 0, grey.new_tensor(FOR)[:, None, None], grey.new_tensor(AGAINST)[:, None, None])
    much = 0.8 * v.abs()
    return (((1 - much) * grey + much * tint) * 255).round().clamp(0, 255).to(torch.uint8)


def drawn(
    picture: Tensor, x: Tensor, threshold: Threshold, side: int, formats: Sequence[Literal["floats", "rle", "png"]]
) -> dict[str, Any]:
    """Render a map (g, g) of an image (3, h, w) in [0, 1] for a response: its mask's area, and the formats asked for.

    Negative values speak against the text and are never in the mask; the overlay outlines the mask in white.
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
    """Return the boundary of a mask (h, w): its pixels that touch the outside."""
    around = torch.nn.functional.max_pool2d((~m).float()[None], 3, 1, 1)[0]
    return m & around.bool()


def png(picture: Tensor) -> str:
    """Encode an image (3, h, w) uint8 as a data: URI."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
