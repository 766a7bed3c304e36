"""The logit lens on image tokens: what each of them would say, how sure, and where.

P = softmax(W_U norm(h)), h (depths, n, D) the states of a row's image tokens at chosen depths. The paper reads states
without the final norm (`normed=False`); on a shallow decoder the norm is needed, and both are offered. A word's number
is the maximum over its tokens' ids (paper, section 3.1). Probabilities are made depth by depth and for wanted ids
alone, so memory is n x V at most.

Shapes: n image tokens, J depths, D width, V vocabulary, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patches.families.base import Base
from patches.families.vlm.layouts import Grid, layout
from registry.errors import Invalid


@torch.inference_mode()
def probabilities(base: Base, seen: Tensor, ids: Tensor | None = None, normed: bool = True) -> Tensor:
    """(J, n, len(ids)) probability of vocabulary ids (default: all) at states `seen` (J, n, D)."""
    where = layout(base.model)
    norm, head = base.model.get_submodule(where.norm), base.model.get_submodule(where.head)
    cap = getattr(base.model.config.get_text_config(), "final_logit_softcapping", None)
    out = []
    for h in seen.to(base.device, base.model.dtype):
        logits = head(norm(h) if normed else h).float()
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        p = logits.softmax(-1)
        out.append(p if ids is None else p[:, ids])
    return torch.stack(out)


def per_word(base: Base, seen: Tensor, words: Sequence[Sequence[int]], normed: bool) -> Tensor:
    """(W, J, n): the maximum over each word's ids."""
    every = sorted({i for w in words for i in w})
    p = probabilities(base, seen, torch.tensor(every, device=base.device), normed)
    at = {i: k for k, i in enumerate(every)}
    return torch.stack([p[..., [at[i] for i in w]].amax(-1) for w in words])


def confidence(base: Base, seen: Tensor, words: Sequence[Sequence[int]], normed: bool = True) -> Tensor:
    """(W,) the paper's internal confidence: the maximum over depths, image tokens and ids of each word."""
    if not words:
        return torch.zeros(0)
    return per_word(base, seen, words, normed).amax((1, 2)).cpu()


def heat(base: Base, seen: Tensor, words: Sequence[Sequence[int]], normed: bool = True) -> Tensor:
    """(W, n) how much each image token says each word: the maximum over depths."""
    return per_word(base, seen, words, normed).amax(1).cpu()


def spread(heat: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """(n,) over the image tokens of one picture -> (H, W) over its pixels, bilinear.

    Raises Invalid for tokens without a place (a Q-Former's).
    """
    if grid is None:
        raise Invalid("This model's image tokens have no place in the picture (Q-Former queries); no heat-map.")
    rows, columns = grid
    field = heat[: rows * columns].reshape(1, 1, rows, columns).float()
    return F.interpolate(field, size=size, mode="bilinear", align_corners=False)[0, 0]


def segment(field: Tensor, threshold: float = 0.5) -> Tensor:
    """(H, W) bool: zero-shot segmentation, where a heat-map exceeds a share of its own maximum."""
    return field > threshold * field.max().clamp_min(1e-12)


def top(base: Base, seen: Tensor, k: int = 3, normed: bool = True) -> list[list[list[tuple[str, float]]]]:
    """Per depth and image token, the k likeliest tokens as text with their probability."""
    p, ids = probabilities(base, seen, None, normed).topk(k, -1)
    tokenizer = base.processor.tokenizer
    return [
        [[(tokenizer.decode([i]).strip(), float(v)) for i, v in zip(some, sure, strict=True)] for some, sure in pair]
        for pair in (zip(a.tolist(), b.tolist(), strict=True) for a, b in zip(ids, p, strict=True))
    ]


def picture(base: Base, row: Any, heat: Tensor, size: int = 192) -> Image.Image:
    """A heat-map of a row's first picture as an RGBA image, (size, size): red where hot, clear where not."""
    grids = layout(base.model).grids(base.model, row.pixels) if row.pixels else [_guess(len(heat))]
    field = spread(heat, grids[0], (size, size)).clamp(0, 1).numpy()
    rgba = np.zeros((size, size, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 1] = 220, 30
    rgba[..., 3] = (field * 200).round().astype(np.uint8)
    return Image.fromarray(rgba)


def _guess(n: int) -> Grid:
    side = int(n**0.5)
    return (side, side) if side * side == n else None
