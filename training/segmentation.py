"""How well maps of heads find the thing: direct effects, raw attention and what one head says, on one table.

Protocol of Gandelsman, Efros, Steinhardt, arXiv 2310.05916, section 5.1: the class is the predicted one, its map less
the mean over classes', bilinear to the picture's size, what is below zero counts as nothing, cut at the map's own mean.
Pixel accuracy, mean intersection over union of thing and ground, mean average precision; and how often the map is
highest in the thing.

Of the lab two tables: single things, and one of three things, asked for by its name. A picture of one thing is found by
looking at all, whatever was asked; among several only a map that answers the question can find the one.

    python -m training.segmentation lab:clip REPORT.json                    # the lab's masks
    python -m training.segmentation open-clip:ViT-L-14/laion2b_s32b_b82k REPORT.json /folder/of/imagenet-seg NAMES.txt
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patches import heatmap
from patches.bases import Base, clip, load_base
from patches.direct import Lens
from patches.heatmap import Threshold
from training.data.images import READERS, Dataset
from training.lab import worlds
from training.textspan import read_pool


def scores(got: Tensor, mask: Tensor, threshold: Threshold = "mean", clip_at_zero: bool = True) -> dict[str, Tensor]:
    """Per picture (B,): pixel accuracy, intersection over union of thing and of ground, their mean, average precision,
    and whether the highest point is in the thing.

    got (B, g, g) maps, mask (B, S, S) bool.
    """
    side = mask.shape[-1]
    cut = heatmap.mask(got, threshold, side, clip_at_zero)
    out = {"accuracy": (cut == mask).float().mean((1, 2))}
    for name, a, b in (("thing", cut, mask), ("ground", ~cut, ~mask)):
        out[name] = (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp_min(1)
    out["iou"] = (out["thing"] + out["ground"]) / 2
    full = heatmap.resized(got, side)
    pairs = zip(full.flatten(1), mask.flatten(1), strict=True)
    out["precision"] = torch.stack([average_precision(x, m) for x, m in pairs])
    out["pointing"] = mask.flatten(1).gather(1, full.flatten(1).argmax(1, keepdim=True))[:, 0].float()
    return out


def average_precision(score: Tensor, right: Tensor) -> Tensor:
    """Mean over right pixels of the share of right ones among those that score at least as high."""
    order = score.argsort(descending=True)
    hit = right[order].float()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return (precision * hit).sum() / hit.sum().clamp_min(1)


def ways(lens: Lens, weights: Tensor) -> Mapping[str, Callable[[Tensor, Tensor | None], Tensor]]:
    """name -> pictures as the processor makes them (B, 3, h, w) and classes (B,), None for what the model says ->
    maps (B, g, g). weights (k, C): a classifier."""

    def direct(x: Tensor, which: Tensor | None, layers: Sequence[int] | None = None) -> Tensor:
        if which is None:
            which = (clip.embed_images(lens.base, x, batch=len(x)) @ weights).argmax(1)
        T = (weights[:, which] - weights.mean(1, keepdim=True)).T  # (B, k)
        heads = None if layers is None else [(i, h) for i in layers for h in range(lens.heads)]
        return torch.stack([heatmap.grid(lens, x[i : i + 1], T[i : i + 1], heads)[0, 0] for i in range(len(x))])

    last = range(max(0, lens.layers - 4), lens.layers)
    return {
        "direct effects": direct,
        "direct effects, last four layers": lambda x, which: direct(x, which, last),
        "raw attention, last layer": lambda x, _: heatmap.attention(lens, x),
        "raw attention, all layers": lambda x, _: heatmap.attention(lens, x, range(lens.layers)),
    }


def table(
    base: Base, data: Dataset, classes: Sequence[str], batch: int = 16, named: bool = False
) -> dict[str, dict[str, Any]]:
    """way -> score -> [mean, half of a 95 % interval, n]; and "all", a map that says the thing is everywhere.

    named: the map of each picture's own label is asked for, not of the class that is predicted.
    """
    lens = Lens(base)
    found: dict[str, dict[str, list[Tensor]]] = {}

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in tqdm(data.batches(batch), "segmentation", disable=None, leave=False):
            there = part.extras["mask"].flatten(1).any(1)
            yield part.image[there], part.extras["mask"][there], part.label[there]

    how = ways(lens, clip.zero_shot(base, classes))
    for image, mask, label in batches():
        x = base.processor.image(image).to(base.device)
        for name, make in how.items():
            for key, value in scores(make(x, label.to(x.device) if named else None).cpu(), mask.cpu()).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
        middle = torch.ones_like(mask, dtype=torch.float32).cpu()
        for key, value in scores(middle, mask.cpu(), "half").items():
            found.setdefault("nothing is found", {}).setdefault(key, []).append(value)
    out: dict[str, dict[str, Any]] = {}
    for name, row in found.items():
        for key, parts in row.items():
            v = torch.cat(parts)
            half = 1.96 * float(v.std()) / len(v) ** 0.5
            out.setdefault(name, {})[key] = [round(float(v.mean()), 4), round(half, 4), len(v)]
    return out


def main(words: Sequence[str]) -> None:
    base = load_base(words[0], "clip")
    base.model.requires_grad_(False)
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    if len(words) > 3:
        tables["things"] = table(base, READERS["imagenet_seg"](words[2]), read_pool(words[3]))
    else:
        tables["single things"] = table(base, worlds.imagenet("test", 300), worlds.imagenet_classes())
        tables["one of three things"] = table(base, worlds.coco("test", 300), worlds.coco_classes(), named=True)
    Path(words[1]).write_text(json.dumps(tables, indent=1))
    for title, got in tables.items():
        for name, row in got.items():
            sys.stdout.write(f"{title}, {name}: {row}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
