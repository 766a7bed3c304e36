"""Draw the synthetic progression of "Learning Video Representations without Natural Videos" (arXiv 2410.24213, 3.1).

    clips = draw("moving_circles", n=256, seed=0)          # (256, 8, 3, 32, 32) uint8

Each of the seven stages adds one property to the previous one:

| stage | adds |
|---|---|
| `static_circles` | circles painted over one another on black |
| `moving_circles` | constant velocity |
| `moving_shapes` | squares, rectangles, triangles, free quadrilaterals beside circles |
| `transforming` | rotation, scale and shear that grow linearly with time |
| `accelerating` | constant acceleration |
| `textures` | statistical textures (1/f^alpha noise) instead of plain colours |
| `image_crops` | crops of still images instead of textures |

The published parameters are pixels of a 256 px canvas per raw frame, over 61 raw frames; here every length is a
fraction of the canvas' side and every rate is per *sampled* frame, so a stage looks the same at any size and frame
count. Where the paper's text, its table 8 and its code disagree, the table and the code are followed (acceleration
0.06; the text's 0.6 is a slip). Not followed: centres are drawn symmetrically around the canvas (the code's U(0, 2R)^2
leaves three quarters of them outside), and a texture is cropped around the object instead of always at its top left
corner.

Objects are painted in a fixed order by a loop over objects; clips, frames and pixels are vectorised. Objects whose
bounding circle never touches the canvas are dropped before the loop. All randomness is drawn on the CPU from the seed,
so a stage is the same on every device up to rounding at edges.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor

from registry.errors import BadRequest, NotFound
from training.lab.renderer import generator, uniform

FRAMES, SIZE, OBJECTS = 8, 32, 48
STAGES = (
    "static_circles", "moving_circles", "moving_shapes", "transforming", "accelerating", "textures", "image_crops",
)  # fmt: skip
CHUNK = 64
"""Clips drawn at once; part of what a seed means"""
RAW_FRAMES, RAW_SIDE = 61, 256
"""Clip of the paper: 16 frames at stride 4, on a canvas of 256 px"""
SPEED, ACCELERATION, TURN, STRETCH = (1.2, 3.0), 0.06, math.pi / 100, 0.005
"""Speed (px), acceleration (px per frame), rotation (radians) and stretch (fraction), each per raw frame (table 8 and
the official scripts)"""
MARGIN = 0.5
"""Distance beyond the canvas at which centres may still be drawn, as a fraction of the side"""
KINDS = 6
"""Number of kinds: circle, square, oriented square, rectangle, triangle, quadrilateral"""
PICTURES = 1024
"""Number of still images from which textures or crops are taken"""


def draw(
    stage: str, n: int, seed: int = 0, frames: int = FRAMES, size: int = SIZE, objects: int = OBJECTS,
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """Draw n clips of a stage: (n, frames, 3, size, size) uint8, on the CPU.

    The same arguments give the same clips; clip i does not depend on n. Raises NotFound for an unknown stage,
    BadRequest for sizes out of range.
    """
    if stage not in STAGES:
        raise NotFound(f"There is no stage {stage!r:.40}. Stages: {', '.join(STAGES)}.")
    if n < 1 or not 2 <= frames <= 128 or not 8 <= size <= 512 or not 1 <= objects <= 1000:
        raise BadRequest(f"n={n}, frames={frames}, size={size}, objects={objects}: at least 1, 2, 8 and 1.")
    parts = []
    for start in range(0, n, CHUNK):
        g = generator("stage", stage, seed, start // CHUNK)
        clips = _chunk(STAGES.index(stage), g, frames, size, objects, torch.device(device))
        parts.append(clips[: n - start].cpu())
    return torch.cat(parts)


@torch.no_grad()
def _chunk(level: int, g: Generator, frames: int, size: int, objects: int, device: torch.device) -> Tensor:
    """Draw one chunk of clips (CHUNK, T, 3, R, R) uint8."""
    inverse, centre, radius = _motion(level, g, frames, objects)
    kind = torch.randint(KINDS, (CHUNK, objects), generator=g) if level >= 2 else torch.zeros(CHUNK, objects).long()
    normal, offset = _polygons(kind, g) if level >= 2 else (torch.zeros(CHUNK, objects, 4, 2),) * 2
    colour = torch.rand(CHUNK, objects, 3, generator=g)
    which = torch.randint(PICTURES, (CHUNK, objects), generator=g)
    order, many = _touching(centre, radius)

    def sort(x: Tensor) -> Tensor:
        """Select the last `many` objects of each clip in painting order: all that touch the canvas."""
        at = order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, at)[:, -many:].to(device)

    inverse, centre, kind = sort(inverse), sort(centre), sort(kind)
    front = _paint(inverse, centre, kind, sort(normal), sort(offset) if level >= 2 else None, size)
    if level < 5:
        return _coloured(front, sort(colour))
    pictures = (lab_pictures if level == 6 else noise_pictures)(size).to(device)
    return _textured(front, inverse, centre, pictures[sort(which)], size)


def _motion(level: int, g: Generator, frames: int, objects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the motions of objects as affine maps over time.

    (B, N, T, 2, 2) maps from the canvas to an object's unit coordinates, (B, N, T, 2) centres, (B, N) bounding radii.

    Centre c(t) = c0 + (v t + a t^2 / 2) (cos phi, sin phi), with c0 at the clip's middle frame; form A(t) = Rot(w t)
    Scale(1 + s t) Shear(h t).
    """
    b, raw = CHUNK, RAW_FRAMES / frames
    t = torch.arange(frames, dtype=torch.float32)
    radius = _radius((b, objects), g)
    start = uniform((b, objects, 2), -MARGIN, 1 + MARGIN, g)
    angle = uniform((b, objects), 0, math.tau, g)
    speed = uniform((b, objects, 1), *SPEED, g) * (raw / RAW_SIDE) * (level >= 1)
    change = ACCELERATION * raw**2 / RAW_SIDE * (level >= 4)
    way = speed * t + uniform((b, objects, 1), -change, change, g) / 2 * t**2
    heading = torch.stack([angle.cos(), angle.sin()], -1)
    centre = start[:, :, None] + (way - way[..., frames // 2, None])[..., None] * heading[:, :, None]
    inverse = torch.eye(2).expand(b, objects, frames, 2, 2)
    reach = radius
    if level >= 3:
        turn = uniform((b, objects, 1), -TURN * raw, TURN * raw, g) * t
        sx, sy, hx, hy = (uniform((4, b, objects, 1), -STRETCH * raw, STRETCH * raw, g) * t).unbind(0)
        cos, sin = turn.cos(), turn.sin()
        rotation = torch.stack([cos, -sin, sin, cos], -1).view(b, objects, frames, 2, 2)
        form = torch.stack([1 + sx, hx, hy, 1 + sy], -1).view(b, objects, frames, 2, 2)
        inverse = torch.linalg.inv(rotation @ form)
        reach = radius * (1 + 2 * STRETCH * raw * frames)
    return inverse / radius[:, :, None, None, None], centre, reach


def _radius(shape: tuple[int, ...], g: Generator) -> Tensor:
    """Draw radii as fractions of the side by a power law on [0.1, 1], pmf ~ 1 / r^3 - 1, as in the official code."""
    grid = torch.linspace(0.1, 1, 200)
    weight = (grid**-3 - 1).clamp_min(0)
    return grid[torch.multinomial(weight, math.prod(shape), replacement=True, generator=g)].view(shape)


def _polygons(kind: Tensor, g: Generator) -> tuple[Tensor, Tensor]:
    """Draw convex shapes in the unit disc: (B, N, 4, 2) outward normals and (B, N, 4) offsets.

    A point u is inside where normal_k . u < offset_k for all four; a triangle repeats a corner, which adds no
    constraint.
    """
    shape = kind.shape
    even = torch.arange(4) * (math.tau / 4) + math.tau / 8
    aspect = uniform((*shape, 1), 0.3, 1.2, g)  # half the angle subtended by a rectangle's short side
    rectangle = torch.cat([aspect / 2, math.pi - aspect / 2, math.pi + aspect / 2, math.tau - aspect / 2], -1)
    free = torch.rand(*shape, 4, generator=g).add(0.3).cumsum(-1)
    free = free / (free[..., -1:] + 0.3) * math.tau
    three = torch.tensor([0, 1, 2, 2]) * (math.tau / 3)
    turn = uniform((*shape, 1), 0, math.tau, g)
    k = kind[..., None]
    corner = torch.where(k == 4, three, torch.where(k == 5, free, torch.where(k == 3, rectangle, even)))
    corner = corner + torch.where(k == 1, torch.zeros(()), turn)
    at = torch.stack([corner.cos(), corner.sin()], -1)
    side = at.roll(-1, 2) - at
    normal = torch.stack([side[..., 1], -side[..., 0]], -1)  # corners are in order of angle, so this points outwards
    offset = (normal * at).sum(-1)
    return normal, torch.where(side.abs().sum(-1) < 1e-6, torch.ones(()), offset)


def _touching(centre: Tensor, reach: Tensor) -> tuple[Tensor, int]:
    """Order objects (B, N), those that never touch the canvas first; also return the most that touch in a clip."""
    near = (centre > -reach[:, :, None, None]) & (centre < 1 + reach[:, :, None, None])
    touches = near.all(-1).any(-1)
    return touches.long().argsort(dim=1, stable=True), max(1, int(touches.sum(1).max()))


def _paint(
    inverse: Tensor, centre: Tensor, kind: Tensor, normal: Tensor, offset: Tensor | None, size: int
) -> Tensor:  # fmt: skip
    """Compute which object is in front at each pixel: (B, T, R, R) int16, counted from 1; 0 where none is.

    A half-plane n . A^-1 (p - c) < o is linear in the pixel p, so it is the sum of one number per row and one per
    column.
    """
    b, n, frames = inverse.shape[:3]
    line = (torch.arange(size, device=inverse.device) + 0.5) / size
    shift = (inverse @ centre[..., None]).squeeze(-1)  # (B, N, T, 2)
    front = torch.zeros(b, frames, size, size, dtype=torch.int16, device=inverse.device)
    if offset is not None:
        slope = torch.einsum("bnkd,bntde->bntke", normal, inverse)  # (B, N, T, 4, 2)
        level = torch.einsum("bnkd,bntd->bntk", normal, shift) + offset[:, :, None]
        across = slope[..., 0, None] * line - level[..., None]  # (B, N, T, 4, R)
        down = slope[..., 1, None] * line
    for i in range(n):
        flat = (kind[:, i] != 0).nonzero()[:, 0]
        disc = (kind[:, i] == 0).nonzero()[:, 0]
        if len(disc):
            a, c = inverse[disc, i], shift[disc, i]
            u = (a[..., 0, 0, None] * line - c[..., 0, None])[:, :, None] + (a[..., 0, 1, None] * line)[..., None]
            v = (a[..., 1, 0, None] * line - c[..., 1, None])[:, :, None] + (a[..., 1, 1, None] * line)[..., None]
            inside = u.mul_(u).add_(v.mul_(v)) < 1
            _stamp(front, disc, inside, i + 1)
        if len(flat):
            x, y = across[flat, i], down[flat, i]  # (B', T, 4, R)
            most = x[:, :, 0, None, :] + y[:, :, 0, :, None]
            for k in (1, 2, 3):
                most = torch.maximum(most, x[:, :, k, None, :] + y[:, :, k, :, None])
            _stamp(front, flat, most < 0, i + 1)
    return front


def _stamp(front: Tensor, rows: Tensor, inside: Tensor, number: int) -> None:
    """Write an object's number where it is inside."""
    if len(rows) == len(front):
        front.masked_fill_(inside, number)
    else:
        front[rows] = front[rows].masked_fill(inside, number)


def _coloured(front: Tensor, colour: Tensor) -> Tensor:
    """Paint objects in plain colours on black: (B, T, 3, R, R) uint8."""
    b, n = colour.shape[:2]
    table = torch.cat([torch.zeros_like(colour[:, :1]), colour], 1).mul(255).to(torch.uint8)
    rows = front.long() + (torch.arange(b, device=front.device) * (n + 1))[:, None, None, None]
    return table.view(-1, 3)[rows].permute(0, 1, 4, 2, 3).contiguous()


def _textured(front: Tensor, inverse: Tensor, centre: Tensor, pictures: Tensor, size: int) -> Tensor:
    """Paint each object with its own image, which moves and deforms with it: (B, T, 3, R, R) uint8.

    pictures: (B, N, 3, S, S); the unit square [-1, 1]^2 of an object shows the whole image.
    """
    b, frames = front.shape[:2]
    n, s = pictures.shape[1], pictures.shape[-1]
    who = front.long().sub(1).clamp_min(0).permute(0, 2, 3, 1).reshape(b, -1, frames)  # (B, R R, T)
    line = (torch.arange(size, device=front.device) + 0.5) / size
    y, x = torch.meshgrid(line, line, indexing="ij")
    p = torch.stack([x, y], -1).view(-1, 1, 2)  # (R R, 1, 2)
    rows = torch.arange(b, device=front.device)[:, None, None]
    when = torch.arange(frames, device=front.device)
    a, c = inverse[rows, who, when], centre[rows, who, when]  # (B, R R, T, 2, 2) and (B, R R, T, 2)
    u = (a @ (p - c)[..., None]).squeeze(-1)
    at = ((u + 1) / 2 * s).long().clamp_(0, s - 1)
    flat = pictures.permute(0, 1, 3, 4, 2).reshape(-1, 3)
    out = flat[((rows * n + who) * s + at[..., 1]) * s + at[..., 0]]  # (B, R R, T, 3)
    out = out.view(b, size, size, frames, 3).permute(0, 3, 4, 1, 2).contiguous()
    return out.masked_fill_((front == 0)[:, :, None], 0)


@lru_cache(4)
def noise_pictures(size: int = SIZE) -> Tensor:
    """Generate statistical textures (PICTURES, 3, S, S) uint8: 1/f^alpha noise, alpha in [0.5, 2.5], random colours."""
    g = generator("stage", "textures", size)
    frequency = (torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size) ** 2).sqrt().clamp_min(1 / size)
    alpha = uniform((PICTURES, 1, 1, 1), 0.5, 2.5, g)
    white = torch.fft.rfft2(torch.randn(PICTURES, 3, size, size, generator=g))
    noise = torch.fft.irfft2(white / frequency**alpha, s=(size, size))
    noise = noise / noise.std((2, 3), keepdim=True)
    mix = torch.randn(PICTURES, 3, 3, generator=g) * 0.5 + torch.eye(3)
    noise = torch.einsum("mij,mjhw->mihw", mix, noise)
    base, contrast = uniform((PICTURES, 3, 1, 1), 0.2, 0.8, g), uniform((PICTURES, 1, 1, 1), 0.08, 0.3, g)
    return (base + noise * contrast).clamp(0, 1).mul(255).round().to(torch.uint8)


@lru_cache(4)
def lab_pictures(size: int = SIZE) -> Tensor:
    """Render still images (PICTURES, 3, S, S) uint8 of the lab's train split, in place of ImageNet's crops."""
    from training.lab import worlds

    image = worlds.imagenet("train", PICTURES, seed=5).read(torch.arange(PICTURES)).image
    return torch.nn.functional.adaptive_avg_pool2d(image.float(), min(size, 96)).round().to(torch.uint8)
