"""Clips as pictures and back: what `embed` shows, and frames that come one by one."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from patches.families.pictures import Budget, guarded
from patches.families.pictures import read as read_picture
from patches.families.pictures import unpacked as from_base64
from patches.families.video.decode import Decoded, Limits, cropped
from registry.errors import Invalid, TooLarge

SHOWN = 96
"""pixels a frame is enlarged to at least, so that small clips can be looked at"""
COLOURS = ((0, 0, 0), (230, 60, 60), (60, 160, 240), (250, 200, 40), (90, 200, 90), (190, 90, 210))


def unpacked(data: str, what: str = "clip") -> bytes:
    """A file's bytes from base64. Raises Invalid as pictures do."""
    return from_base64(data, what)


def stacked(frames: Sequence[str], limits: Limits) -> Decoded:
    """Pictures as a clip of 25 a second. Raises as reading pictures does, and Invalid if their sizes differ."""
    budget = Budget()
    pictures = [read_picture(frame, budget) for frame in frames]
    size = pictures[0].size
    if odd := [i for i, p in enumerate(pictures) if p.size != size]:
        raise Invalid(f"Frame {odd[0]} is {pictures[odd[0]].size}, the first is {size}; send frames of one size.")
    if size[0] * size[1] > limits.pixels:
        raise TooLarge(f"The frames have {size[0]} x {size[1]} pixels; {limits.pixels} together are allowed.")
    video = torch.stack([torch.from_numpy(np.asarray(p).copy()) for p in pictures]).permute(0, 3, 1, 2).contiguous()
    return Decoded(video, torch.arange(len(video), dtype=torch.float64) / 25, (size[1], size[0]))


def mask(data: str, size: tuple[int, int], side: int) -> Tensor:
    """(side, side) int64 objects of a PNG of the first frame, cut as the frames are. Raises Invalid."""
    raw = unpacked(data, "mask")
    with guarded():
        picture = Pillow.open(io.BytesIO(raw), formats=("PNG",))
        if picture.width * picture.height > 40_000_000:
            raise TooLarge(f"The mask has {picture.width} x {picture.height} pixels.")
        picture.load()
    if (picture.height, picture.width) != size:
        raise Invalid(
            f"The mask is {picture.width} x {picture.height}, the clip {size[1]} x {size[0]}; they must agree."
        )
    plain = picture if picture.mode in ("P", "L") else picture.convert("L")
    values = np.asarray(plain).astype(np.int64)
    kinds = [v for v in np.unique(values) if v]
    if not 1 <= len(kinds) <= 31:
        raise Invalid(f"The mask holds {len(kinds)} objects; 1 to 31 are allowed, each its own number, 0 the ground.")
    layers = torch.from_numpy(np.stack([(values == v) for v in kinds]).astype(np.uint8) * 255)
    cut = cropped(layers[:, None], side)[:, 0].float() / 255
    best, which = cut.max(0)
    objects: Tensor = torch.where(best >= 0.5, which + 1, 0)
    if not bool(objects.any()):
        raise Invalid(f"Nothing of the mask is left in the {side} x {side} pixels that the model sees.")
    return objects


def _grown(frame: Tensor) -> Pillow.Image:
    """(3, R, R) in [0, 1] as a picture of at least SHOWN pixels."""
    pixels = frame.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Pillow.fromarray(pixels)
    times = -(-SHOWN // min(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Pillow.Resampling.NEAREST)


def still(rows: Sequence[Tensor]) -> str:
    """Clips (T, 3, R, R) under each other, frames side by side: a PNG as base64."""
    grid = torch.cat([torch.cat(list(row), -1) for row in rows], -2)
    pixels = grid.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Pillow.fromarray(pixels)
    times = max(1, -(-48 // rows[0].shape[-1]))
    stream = io.BytesIO()
    picture.resize((picture.width * times, picture.height * times), Pillow.Resampling.NEAREST).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def animated(rows: Sequence[Tensor], mark: int = 0) -> str:
    """Clips (T, 3, R, R) side by side as one animated WebP, in base64. mark: frame from which a red line is drawn on
    the last clip, where a rollout begins."""
    frames = []
    for t in range(len(rows[0])):
        row = [r[t].clone() for r in rows]
        if mark and t >= mark:
            row[-1][:, :1] = torch.tensor([1.0, 0.2, 0.2])[:, None, None]
        gap = torch.ones(3, row[0].shape[-2], 1)
        frames.append(_grown(torch.cat([x for r in row for x in (r, gap)][:-1], -1)))
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], duration=160, loop=0, lossless=True)
    return base64.b64encode(stream.getvalue()).decode()


def labels(objects: Tensor) -> str:
    """(R, R) labels as a palette PNG in base64."""
    picture = Pillow.fromarray(objects.to(torch.uint8).numpy()).convert("P")
    picture.putpalette([c for i in range(32) for c in COLOURS[i % len(COLOURS) if i else 0]])
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def overlaid(clip: Tensor, objects: Tensor) -> str:
    """A clip with its objects tinted, animated."""
    table = torch.tensor([COLOURS[i % len(COLOURS) if i else 0] for i in range(32)]) / 255
    tint = table[objects].permute(0, 3, 1, 2)
    there = (objects > 0)[:, None]
    return animated([clip, torch.where(there, 0.45 * clip + 0.55 * tint, clip)])
