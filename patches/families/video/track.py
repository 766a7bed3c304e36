"""Propagates the labels of a clip's first frame along its features: the DAVIS protocol of STC and DINO.

Every place of a later slice takes the labels of the k places it resembles most, among the first slice and the last few
slices before it, within a radius, weighed by softmax of their cosine. Labels are carried as the whole patch of pixels
that a place stands for, not as its mean: with a few large patches a thing is smaller than one of them.

A patch of the lab is as large as a thing, so features are read at finer places (`finer`): the picture is shifted by
parts of a patch and read again, and what a place of the model's own grid always says, wherever things are, is taken
away. Dense features by shifts are old (Sermanet et al., OverFeat, 2014); they cost parts^2 forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

if TYPE_CHECKING:
    from patches.families.video.model import VideoModel

PARTS, SHARP = 2, 0.03
"""parts of a patch's side that one finer place is, and the temperature of matching them; both chosen on val"""


def finer(model: VideoModel, clip: Tensor, layers: Sequence[int], parts: int = PARTS) -> list[Tensor]:
    """Features of a clip (T, 3, R, R) uint8 at places of 1 / parts of a patch: (S, side^2, d) for each of `layers`.

    Pictures are shifted by parts of a patch (edges repeated) and read parts^2 times. The mean over slices and shifts of
    each place of the model's own grid is taken away: it says where the place is, not what is there. On the CPU.
    """
    step = model.cell // parts
    size, count = clip.shape[-1], model.grid[1]
    wide = nnf.pad(clip.float(), (model.cell // 2,) * 4, mode="replicate").to(torch.uint8)
    out: list[Tensor] = []
    for i in range(parts):
        for j in range(parts):
            y, x = i * step + step // 2, j * step + step // 2
            states = model.matching(wide[None, ..., y : y + size, x : x + size].to(next(model.parameters()).device))
            for n, layer in enumerate(layers):
                f = states[layer].float().cpu().reshape(-1, count, count, states[layer].shape[-1])
                if len(out) <= n:
                    out.append(f.new_zeros(len(f), count, parts, count, parts, f.shape[-1]))
                out[n][:, :, i, :, j] = f
    return [(f - f.mean((0, 2, 4), keepdim=True)).reshape(len(f), (count * parts) ** 2, -1) for f in out]


def propagate(
    features: Tensor, mask: Tensor, side: int, context: int = 7, radius: float = 0.0, nearest: int = 5,
    temperature: float = 0.1,
) -> Tensor:  # fmt: skip
    """Follow the objects of a first frame through a clip.

    features (S, side^2, d) of the clip's slices; mask (R, R) int64 labels of the first frame, 0 the background, R a
    multiple of side; radius in places, 0 for a fifth of the side (12 of 60 on DAVIS) and at least 1. Returns (S, R, R)
    int64 labels, the first as given.
    """
    slices, size = len(features), mask.shape[-1]
    x = nnf.normalize(features.float(), dim=-1)
    objects, cell = int(mask.max()) + 1, size // side
    one_hot = nnf.one_hot(mask.long(), objects).permute(2, 0, 1)[None].float()
    first = nnf.unfold(one_hot, cell, stride=cell)[0].T  # (side^2, objects * cell^2)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
    far = (torch.cdist(at, at) > (radius or max(1.0, side / 5))).to(x.device)
    soft, out = [first], [mask.long()]
    for s in range(1, slices):
        back = [0, *range(max(1, s - context), s)]
        near = torch.cat([(x[s] @ x[b].T).masked_fill(far, -torch.inf) for b in back], 1)  # (places, back * places)
        best, where = near.topk(min(nearest, near.shape[1]), 1)
        weight = (best / temperature).softmax(1)
        known = torch.cat([soft[b] for b in back])
        soft.append((weight[..., None] * known[where]).sum(1))
        picture = nnf.fold(soft[-1].T[None], (size, size), cell, stride=cell)
        out.append(picture[0].argmax(0))
    return torch.stack(out)


def to_frames(labels: Tensor, frames: int) -> Tensor:
    """(S, R, R) labels of slices -> (T, R, R) of frames: each frame takes its slice's."""
    return labels[torch.arange(frames) * len(labels) // frames]
