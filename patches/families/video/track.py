"""Propagates the labels of a clip's first frame along its features: the DAVIS protocol of STC and DINO.

Every place of a later slice takes the labels of the k places it resembles most, among the first slice and the last few
slices before it, within a radius, weighed by softmax of their cosine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def propagate(
    features: Tensor, mask: Tensor, side: int, context: int = 7, radius: float = 2.5, nearest: int = 5,
    temperature: float = 0.1,
) -> Tensor:  # fmt: skip
    """Follow the objects of a first frame through a clip.

    features (S, side^2, d) of the clip's slices; mask (R, R) int64 labels of the first frame, 0 the background; radius
    in places. Returns (S, R, R) int64 labels, the first as given.
    """
    slices = len(features)
    x = nnf.normalize(features.float(), dim=-1)
    size = mask.shape[-1]
    objects = int(mask.max()) + 1
    one_hot = nnf.one_hot(mask.long(), objects).permute(2, 0, 1)[None].float()
    first = nnf.adaptive_avg_pool2d(one_hot, side).flatten(2)[0].T  # (side^2, objects)
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
    far = (torch.cdist(at, at) > radius).to(x.device)
    soft, out = [first], [mask.long()]
    for s in range(1, slices):
        back = [0, *range(max(1, s - context), s)]
        near = torch.cat([(x[s] @ x[b].T).masked_fill(far, -torch.inf) for b in back], 1)  # (places, back * places)
        best, where = near.topk(min(nearest, near.shape[1]), 1)
        weight = (best / temperature).softmax(1)
        known = torch.cat([soft[b] for b in back])
        soft.append((weight[..., None] * known[where]).sum(1))
        picture = soft[-1].T.view(1, objects, side, side)
        large = nnf.interpolate(picture, size=(size, size), mode="bilinear", align_corners=False)
        out.append(large[0].argmax(0))
    return torch.stack(out)


def to_frames(labels: Tensor, frames: int) -> Tensor:
    """(S, R, R) labels of slices -> (T, R, R) of frames: each frame takes its slice's."""
    return labels[torch.arange(frames) * len(labels) // frames]
