"""Video object segmentation by label propagation, scored as in DAVIS: region similarity J and boundary accuracy F.

J is the IoU of an object's predicted and true masks. F is the harmonic mean of the precision and recall of their
boundaries, matched within 0.8 % of the image diagonal and at least one pixel. Both are averaged over objects and all
frames but the first; objects that are not in the first frame are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.families.video import VideoModel
from patches.families.video.track import PARTS, SHARP, finer, propagate, to_frames
from registry.measure import Measure
from training.tasks.intervals import mean


def region(a: Tensor, b: Tensor) -> float:
    """Compute J, the IoU of two boolean masks (R, R); 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def boundary(a: Tensor, b: Tensor) -> float:
    """Compute F, the boundary F-measure of two boolean masks (R, R)."""
    reach = max(1, round(0.008 * math.hypot(*a.shape)))
    edge_a, edge_b = _edge(a), _edge(b)
    if not bool(edge_a.any()) or not bool(edge_b.any()):
        return float(bool(edge_a.any()) == bool(edge_b.any()))
    near_a, near_b = _grown(edge_a, reach), _grown(edge_b, reach)
    precision = float((edge_a & near_b).sum() / edge_a.sum())
    recall = float((edge_b & near_a).sum() / edge_b.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _edge(mask: Tensor) -> Tensor:
    """Return the boundary pixels of a mask (R, R)."""
    inner = -nnf.max_pool2d(-nnf.pad(mask[None, None].float(), (1, 1, 1, 1)), 3, 1)[0, 0]
    return mask & (inner < 0.5)


def _grown(mask: Tensor, reach: int) -> Tensor:
    """Dilate a mask (R, R) by `reach` pixels."""
    return nnf.max_pool2d(mask[None, None].float(), 2 * reach + 1, 1, reach)[0, 0] > 0.5


def score(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Return J and F of object labels (T, R, R) against the true ones, without frame 0; NaN without any object."""
    objects = [int(o) for o in true[0].unique() if int(o)]
    pairs = [
        (region(found[t] == o, true[t] == o), boundary(found[t] == o, true[t] == o))
        for o in objects for t in range(1, len(true)) if bool((true[t] == o).any())
    ]  # fmt: skip
    if not pairs:
        return float("nan"), float("nan")
    return sum(j for j, _ in pairs) / len(pairs), sum(f for _, f in pairs) / len(pairs)


class Pixels:
    """A baseline for tracking: a model whose features are the patches' own pixels."""

    def __init__(self, model: VideoModel) -> None:
        self.cell, self.grid = model.cell, model.grid

    def matching(self, clips: Tensor) -> list[Tensor]:
        """Return patches (b T, n, 3 cell^2) of frames (b, T, 3, R, R), in raster order."""
        return [nnf.unfold(clips.float().flatten(0, 1), self.cell, stride=self.cell).transpose(1, 2) / 255]

    def parameters(self) -> Iterable[Tensor]:
        return iter((torch.empty(0),))


@torch.no_grad()
def tracks(model: VideoModel, video: Tensor, mask: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Propagate the first-frame mask of a clip (T, 3, R, R) along a model's features at finer places; returns labels
    (T, R, R) by layer. T is the model's own for a VideoMAE, any number for a Toto."""
    side = model.grid[1] * PARTS
    return [to_frames(propagate(x, mask[0].long(), side, temperature=SHARP), len(mask))
            for x in finer(model, video, layers)]  # fmt: skip


def tracked(model: VideoModel, clips: Iterable[tuple[Tensor, Tensor]], layers: Sequence[int]) -> dict[str, Measure]:
    """Average the mean of J and F over (video, mask) pairs: of each layer, of its paired difference to the copy
    baseline (`layer 2 - copy`), of copying the first mask (`copy`), and of tracking by pixels (`pixels`)."""
    alone: Any = Pixels(model)
    both: dict[str, list[float]] = {}
    for video, mask in clips:
        copy = score(mask[:1].long().expand_as(mask), mask.long())
        if copy[0] != copy[0]:  # nothing to follow
            continue
        both.setdefault("copy", []).append(sum(copy) / 2)
        (found,) = tracks(alone, video, mask, [0])
        both.setdefault("pixels", []).append(sum(score(found, mask.long())) / 2)
        for layer, found in zip(layers, tracks(model, video, mask, layers), strict=True):
            both.setdefault(f"layer {layer}", []).append(sum(score(found, mask.long())) / 2)
            both.setdefault(f"layer {layer} - copy", []).append(both[f"layer {layer}"][-1] - both["copy"][-1])
    return {k: mean(v) for k, v in both.items()}
