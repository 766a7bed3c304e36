"""A judge of captions that had no part in any search: the CNN over all names of the atlas, looking through crops.

It shares nothing with lab:clip: no weight, no text, no training picture (`training.lab.judge`: rendered single things
of seven styles). What it makes of a caption is a CLIPScore by other eyes: for every thing that is said, the judge's
largest probability of that name over 16 crops, of all 1,198 names; their mean, 0 for a caption that says none. A
caption of one thing out of two can score as well as one of both, so F1 of exact things stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from training.lab import atlas
from training.lab import judge as cnn
from training.tasks.captions import named

SIDE, STEP = 1 / 2, 1 / 6
"""crops: their side and their distance, as shares of the picture's side; chosen on val (docs/log/mils.md)"""
INPUT = 64


def seen(pictures: Tensor) -> Tensor:
    """(n, names) largest probability of every name over the crops of uint8 pictures (n, 3, H, W)."""
    size, net = pictures.shape[-1], cnn.load()
    side, step = round(SIDE * size), round(STEP * size)
    found: Tensor | None = None
    for y in range(0, size - side + 1, step):
        for x in range(0, size - side + 1, step):
            crop = F.interpolate(pictures[:, :, y : y + side, x : x + side].float() / 255, (INPUT, INPUT),
                                 mode="bilinear", antialias=True)  # fmt: skip
            p = cnn.logits(net, crop.clamp(0, 1)).softmax(-1)
            found = p if found is None else torch.maximum(found, p)
    assert found is not None
    return found


def score(probability: Tensor, texts: Sequence[str]) -> list[float]:
    """What the judge makes of every text, of `seen`'s rows."""
    names = atlas.load().names
    at = {name: i for i, name in enumerate(names)}
    out = []
    for row, text in zip(probability, texts, strict=True):
        said = [float(row[at[name]]) for name in named(text, names) if name in at]
        out.append(sum(said) / len(said) if said else 0.0)
    return out


def right(pictures: Tensor, names: Sequence[str]) -> list[bool]:
    """Whether the judge calls drawn pictures (n, 3, H, W) uint8 of one thing each what was asked for, of all names."""
    known = atlas.load().names
    x = F.interpolate(pictures.float() / 255, (INPUT, INPUT), mode="bilinear", antialias=True).clamp(0, 1)
    best = cnn.logits(cnn.load(), x).argmax(1).tolist()
    return [known[b] == name for b, name in zip(best, names, strict=True)]
