"""Draw clips whose class is the motion of their objects, whatever the objects, positions and background.

    clips = draw("train", n=512, seed=0)            # clips.video (512, 8, 3, 32, 32) uint8, clips.label (512,)

All three to five objects of a clip have the clip's motion, each with its own speed, size, phase and position. Every
motion is centred in time on frame T // 2, where position, size and rotation are drawn independently of the class: by
construction the middle frame carries no class information (the negative control). `train`, `val` and `test` share no
sprite and no background texture, as in `training.lab.worlds`. Masks say which object is in front at every pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor

from registry.errors import BadRequest, NotFound
from training.lab import atlas, renderer, worlds
from training.lab.renderer import choose, generator, grounds, things, uniform
from training.lab.worlds import MOTIONS

FRAMES, SIZE = 8, 32
THINGS = (3, 5)
CHUNK = 64
SPRITE = 64
"""Side of the atlas's sprites in pixels"""


@dataclass(frozen=True)
class Clips:
    """n clips with their ground truth."""

    video: Tensor
    """(n, T, 3, R, R) uint8"""
    label: Tensor
    """(n,) int64 index in MOTIONS"""
    mask: Tensor
    """(n, T, R, R) uint8 number of the object visible at each pixel, from 1; 0 is the background"""

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: slice | Tensor) -> Clips:
        return Clips(self.video[rows], self.label[rows], self.mask[rows])


def draw(
    split: str, n: int, seed: int = 0, frames: int = FRAMES, size: int = SIZE, many: tuple[int, int] = THINGS
) -> Clips:  # fmt: skip
    """Draw n clips of a split, with classes as balanced as possible in every 11 neighbours.

    many: smallest and largest number of objects in a clip. The same arguments give the same clips; clip i does not
    depend on n. Raises NotFound for an unknown split, BadRequest for sizes out of range.
    """
    if split not in worlds.STYLES:
        raise NotFound(f"There is no split {split!r:.40}. Splits: {', '.join(worlds.STYLES)}.")
    if n < 1 or not 2 <= frames <= 128 or not 8 <= size <= renderer.SIZE or not 1 <= many[0] <= many[1] <= 8:
        raise BadRequest(f"n={n}, frames={frames}, size={size}, many={many}: out of range.")
    g = generator("video-actions-labels", split, seed)
    rounds = -(-n // len(MOTIONS))
    label = torch.cat([torch.randperm(len(MOTIONS), generator=g) for _ in range(rounds)])[:n]
    parts = []
    for start in range(0, n, CHUNK):
        one = label[start : start + CHUNK]
        whole = nnf.pad(one, (0, CHUNK - len(one)))  # always a whole chunk, so that a clip does not depend on n
        g = generator("video-actions", split, seed, start // CHUNK)
        parts.append(_chunk(split, whole, g, frames, size, many)[: len(one)])
    return Clips(*(torch.cat([getattr(p, f) for p in parts]) for f in ("video", "label", "mask")))


@torch.no_grad()
def _chunk(split: str, label: Tensor, g: Generator, frames: int, size: int, many: tuple[int, int]) -> Clips:
    n, k = len(label), many[1]
    lab = atlas.load()
    ids = [i for i, group in enumerate(lab.groups) if group not in ("smileys-emotion", "people-body")]
    sprite = choose(lab.pick(ids, worlds.STYLES[split]), (n * k,), g)
    there = torch.arange(k) < torch.randint(many[0], many[1] + 1, (n, 1), generator=g)
    ground = grounds(n, g, textures=worlds._TEXTURES[split])
    thing = things(sprite, g, size=(0.25, 0.42))
    thing = replace(thing, centre=uniform((n * k, 1, 2), -0.7, 0.7, g))
    centre, scale, turn = _moved(thing, label.repeat_interleave(k), frames, g)

    canvas = renderer._cut(ground, torch.device("cpu"), size)[:, :, None].expand(-1, -1, frames, -1, -1)
    picture = renderer._tinted(lab.sprites[sprite].float(), thing.tint[:, 0])  # premultiplied by opacity
    smaller = max(1, 2 ** int(math.log2(SPRITE / (0.42 * size))))  # sampling more coarsely than this would flicker
    drawn = _sampled(nnf.avg_pool2d(picture, smaller), centre, scale, turn, thing.mirror[:, 0], size)
    drawn = drawn.view(n, k, 4, frames, size, size)
    out = canvas.clone()
    mask = torch.zeros(n, frames, size, size, dtype=torch.uint8)
    for i in range(k):
        layer = drawn[:, i] * there[:, i, None, None, None, None]
        out = torch.addcmul(layer[:, :3], out, 1 - layer[:, 3:])
        mask.masked_fill_(layer[:, 3] > 0.5, i + 1)
    return Clips(out.round_().clamp_(0, 255).to(torch.uint8).transpose(1, 2).contiguous(), label, mask)


def _moved(thing: renderer.Things, label: Tensor, frames: int, g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Compute centres (m, T, 2), sizes (m, T) and rotations (m, T) of m objects with their clips' motions."""
    m = len(label)
    t = (torch.arange(frames) - frames // 2) / (frames - 1)  # 0 in the middle frame, about -1/2 to 1/2
    speed = uniform((m, 1), 0.6, 1.0, g)
    sign = torch.where(torch.rand(m, 1, generator=g) < 0.5, 1.0, -1.0)
    is_ = {name: (label == i).float()[:, None] for i, name in enumerate(MOTIONS)}
    way, wave = 1.1 * speed * t, 0.45 * speed * torch.sin(2 * math.tau * t)
    x = thing.centre[:, 0, :1] + (is_["right"] - is_["left"]) * way + is_["swing"] * sign * wave
    hop = 0.8 * speed * torch.sin(math.tau * t).abs()
    y = thing.centre[:, 0, 1:] + (is_["down"] - is_["up"]) * way + is_["bounce"] * (-hop)
    scale = thing.size * torch.exp((is_["grow"] - is_["shrink"]) * 0.9 * speed * t)
    turn = thing.turn + (is_["spin right"] - is_["spin left"]) * 1.5 * math.pi * speed * t
    return torch.stack([x, y], -1), scale, turn


def _sampled(picture: Tensor, centre: Tensor, scale: Tensor, turn: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Sample every frame of every object from its sprite: (m, 4, T * R, R)."""
    m, frames = scale.shape
    grid = renderer._grid(
        centre.reshape(-1, 2), scale.reshape(-1), turn.reshape(-1), mirror.repeat_interleave(frames), 1.0
    ).view(m, frames, 2, 3)
    steps = (torch.arange(size) * 2 + 1) / size - 1
    column, row, at = grid[:, :, :, None, None, :].unbind(-1)
    where = column * steps + at + row * steps[:, None]  # (m, T, 2, R, R)
    where = where.permute(0, 1, 3, 4, 2).reshape(m, frames * size, size, 2)
    return nnf.grid_sample(picture, where, align_corners=False)
