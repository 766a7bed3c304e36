"""Corrupt clips as in UCF101-P: fourteen kinds of noise, blur, camera motion, compression and temporal damage.

    worse = corrupt(clips, "shot")          # (n, T, 3, R, R) uint8 -> the same shape

`reverse` and `jumble` destroy the motion; in the lab a reversed `left` is a `right`, so a model that uses motion must
lose accuracy on it, and one that does not uses something else.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Generator, Tensor

from registry.errors import NotFound
from training.lab.renderer import generator

SEVERITY = 1.0


def corrupt(video: Tensor, kind: str, seed: int = 0) -> Tensor:
    """Return a corrupted copy of clips (n, T, 3, R, R) uint8. Raises NotFound for an unknown kind."""
    if kind not in CORRUPTIONS:
        raise NotFound(f"There is no corruption {kind!r:.40}. Corruptions: {', '.join(CORRUPTIONS)}.")
    g = generator("corruption", kind, seed, len(video))
    x = CORRUPTIONS[kind](video.float() / 255, g)
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def _warp(x: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Rotate frames by angle (n, T), shift them by (n, T, 2) and scale them by (n, T), repeating edges."""
    n, t, c, h, w = x.shape
    cos, sin = (angle.cos() / scale).flatten(), (angle.sin() / scale).flatten()
    theta = torch.stack([torch.stack([cos, -sin, shift[..., 0].flatten()], -1),
                         torch.stack([sin, cos, shift[..., 1].flatten()], -1)], 1)  # fmt: skip
    grid = nnf.affine_grid(theta, [n * t, c, h, w], align_corners=False)
    out = nnf.grid_sample(x.flatten(0, 1), grid, padding_mode="border", align_corners=False)
    return out.view_as(x)


def _still(x: Tensor, value: float = 0.0) -> Tensor:
    return torch.full(x.shape[:2], value)


def _translate(x: Tensor, g: Generator) -> Tensor:
    """Shift each frame at random by up to a tenth of the side."""
    return _warp(x, _still(x), (torch.rand(*x.shape[:2], 2, generator=g) - 0.5) * 0.4, _still(x, 1.0))


def _rotate(x: Tensor, g: Generator) -> Tensor:
    """Rotate each frame at random by up to 15 degrees."""
    return _warp(
        x, (torch.rand(x.shape[:2], generator=g) - 0.5) * math.pi / 6, torch.zeros(*x.shape[:2], 2), _still(x, 1.0)
    )


def _static_rotate(x: Tensor, g: Generator) -> Tensor:
    """Rotate the whole clip by one random angle of up to 30 degrees."""
    angle = (torch.rand(len(x), 1, generator=g) - 0.5) * math.pi / 3
    return _warp(x, angle.expand(x.shape[:2]), torch.zeros(*x.shape[:2], 2), _still(x, 1.0))


def _zoom(x: Tensor, _: Generator) -> Tensor:
    """Blur by zooming: the mean of four enlargements up to 1.25."""
    shift = torch.zeros(*x.shape[:2], 2)
    return torch.stack([_warp(x, _still(x), shift, _still(x, s)) for s in (1.0, 1.08, 1.16, 1.25)]).mean(0)


def _shot(x: Tensor, g: Generator) -> Tensor:
    return torch.poisson(x * 30, generator=g) / 30


def _speckle(x: Tensor, g: Generator) -> Tensor:
    return x + x * torch.randn(x.shape, generator=g) * 0.2


def _gaussian(x: Tensor, g: Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=g) * 0.1


def _impulse(x: Tensor, g: Generator) -> Tensor:
    hit = torch.rand(x.shape[0], x.shape[1], 1, *x.shape[3:], generator=g)
    return torch.where(hit < 0.02, 0.0, torch.where(hit > 0.98, 1.0, x))


def _defocus(x: Tensor, _: Generator) -> Tensor:
    return nnf.avg_pool2d(nnf.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(x)


def _jpeg(x: Tensor, _: Generator) -> Tensor:
    out = torch.empty_like(x)
    for i, frame in enumerate(x.flatten(0, 1)):
        stream = io.BytesIO()
        Image.fromarray(frame.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(
            stream, "JPEG", quality=15
        )
        pixels = np.asarray(Image.open(stream)).copy()
        out.view(-1, *x.shape[2:])[i] = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    return out


def _freeze(x: Tensor, g: Generator) -> Tensor:
    """Repeat the previous frame at random, as a stalling stream does."""
    stall = torch.rand(x.shape[:2], generator=g) < 0.4
    at = torch.where(stall, 0, torch.arange(x.shape[1])).cummax(1).values
    return x.gather(1, at.view(*at.shape, 1, 1, 1).expand_as(x))


def _jumble(x: Tensor, g: Generator) -> Tensor:
    """Shuffle all frames."""
    at = torch.rand(x.shape[:2], generator=g).argsort(1)
    return x.gather(1, at.view(*at.shape, 1, 1, 1).expand_as(x))


def _box_jumble(x: Tensor, g: Generator) -> Tensor:
    """Shuffle frames within each half of the clip."""
    half = torch.arange(x.shape[1]) // max(1, x.shape[1] // 2)
    at = (half + torch.rand(x.shape[:2], generator=g) * 0.99).argsort(1)
    return x.gather(1, at.view(*at.shape, 1, 1, 1).expand_as(x))


def _reverse(x: Tensor, _: Generator) -> Tensor:
    return x.flip(1)


CORRUPTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "translate": _translate, "rotate": _rotate, "static_rotate": _static_rotate, "shot": _shot, "speckle": _speckle,
    "gaussian": _gaussian, "impulse": _impulse, "defocus": _defocus, "zoom": _zoom, "jpeg": _jpeg, "freeze": _freeze,
    "box_jumble": _box_jumble, "jumble": _jumble, "reverse": _reverse,
}  # fmt: skip
