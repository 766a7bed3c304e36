"""Edits that ablate heads (to zero or to their mean), and random heads of the same layers as controls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patches.engine.read import record
from patches.families import clip
from patches.families.base import Base
from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadConfig, HeadEdit, Mode
from training.clip_heads.config import Config
from training.clip_heads.find import Head, scenes


@torch.no_grad()
def means(base: Base, config: Config) -> Tensor:
    """Compute the mean output (L, H, e) of every head over train images, at the class token or over all tokens."""
    lens = Lens(base)
    sites = [clip.site("heads", i) for i in range(lens.layers)]
    total, count = torch.zeros(lens.layers, lens.out.shape[2] * lens.heads), 0

    def average(x: Tensor) -> Tensor:  # (B, T, D) -> (D,)
        return (x[:, 0] if config.tokens == "cls" else x.mean(1)).float().sum(0)

    for data in scenes(config, min(config.span_images, 256)):
        for part in data.batches(32):
            with record(base.model, sites, "input", average) as acts:
                clip.embed_images(base, part.image, batch=len(part))
            total += torch.stack([acts[s][0].cpu() for s in sites])
            count += len(part)
    return (total / count).reshape(lens.layers, lens.heads, -1)


def silence(lens: Lens, heads: Sequence[Head], mode: Mode, tokens: str, mean: Tensor) -> HeadEdit:
    """Build the edit that sets the output of these heads to zero or to its mean."""
    config = HeadConfig(clip.SITES["heads"], tuple(heads), lens.heads, mode, "cls" if tokens == "cls" else "all")
    value = {"value": torch.stack([mean[layer, head] for layer, head in heads])} if mode == "mean" else {}
    return HeadEdit(config, value)


def random_heads(heads: Sequence[Head], every: Sequence[Head], seed: int) -> list[Head]:
    """Draw a control: as many other heads, from the same layers while those have any left."""
    g = torch.Generator().manual_seed(seed)
    order = [every[i] for i in torch.randperm(len(every), generator=g).tolist() if every[i] not in heads]
    out: list[Head] = []
    for layer, _ in heads:
        left = [h for h in order if h not in out]
        out.append(next((h for h in left if h[0] == layer), left[0] if left else heads[len(out)]))
    return out
