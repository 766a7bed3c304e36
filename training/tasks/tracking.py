"""Video object segmentation by label propagation, scored as in DAVIS: region similarity J and boundary accuracy F.

J is the IoU of an object's predicted and true masks. F is the harmonic mean of the precision and recall of their
boundaries, matched within 0.8 % of the image diagonal and at least one pixel. Both are averaged over objects and all
frames but the first; objects that are not in the first frame are left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.families.video.track import propagate, to_frames


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
    """Return J and F of predicted object labels (T, R, R) against the true ones, without frame 0; NaN without any
    object."""
    objects = [int(o) for o in true[0].unique() if int(o)]
    pairs = [
        (region(found[t] == o, true[t] == o), boundary(found[t] == o, true[t] == o))
        for o in objects for t in range(1, len(true)) if bool((true[t] == o).any())
    ]  # fmt: skip
    if not pairs:
        return float("nan"), float("nan")
    return sum(j for j, _ in pairs) / len(pairs), sum(f for _, f in pairs) / len(pairs)


def summary(scores: list[tuple[float, float]]) -> dict[str, float]:
    """Average J and F over clips: their means, the mean JF of both with its standard error `se`, and n clips."""
    kept = torch.tensor([s for s in scores if s[0] == s[0]])
    both = kept.mean(1)
    return {
        "J": round(float(kept[:, 0].mean()), 4),
        "F": round(float(kept[:, 1].mean()), 4),
        "JF": round(float(both.mean()), 4),
        "se": round(float(both.std() / len(both) ** 0.5), 4),
        "n": len(kept),
    }


def each(found: Tensor, mask: Tensor) -> list[tuple[float, float]]:
    """Return J and F of every clip: predicted labels (n, T, R, R) against masks (n, T, R, R)."""
    return [score(labels.long(), m.long()) for labels, m in zip(found, mask, strict=True)]


def copied(mask: Tensor) -> dict[str, float]:
    """Score the baseline that copies the first frame's mask (n, T, R, R) to all frames."""
    return summary([score(m[:1].long().expand_as(m), m.long()) for m in mask])


def tracks(features: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Propagate first-frame masks of clips (n, T, R, R) along patch features (n, S side^2, d); returns labels (n, T, R,
    R).

    grid: (S, side), the numbers of time slices and of patches a side.
    """
    slices, side = grid
    out = [to_frames(propagate(x.view(slices, side * side, -1), m[0].long(), side), len(m))
           for x, m in zip(features, mask, strict=True)]  # fmt: skip
    return torch.stack(out)


def tracked(features: Tensor, mask: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Score propagation along features: J, F, their mean JF with its standard error, n."""
    return summary(each(tracks(features, mask, grid), mask))
