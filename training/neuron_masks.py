"""Masks by neurons, beside direct effects and attention on one table: how well maps over patches find the thing.

As in the literature on ImageNet-Seg: the map of the class that the model itself says, laid over the picture bilinearly,
min-max per picture, cut at 0.5 or at its own mean; pixel accuracy and mIoU over {ground, thing} from counts summed over
all pictures, mAP the mean over pictures of the average precision of both. Ways:

- `neurons, <vote>`: activations of the neurons whose direction says the class most (arXiv 2406.04341, 200 neurons);
- `neurons, effect` (ours): what all neurons add to the class through later heads, less the mean over classes, by the
  patch they fire at;
- `direct`: what all heads add to the class, less the mean over classes, by patch read (arXiv 2310.05916);
- `attention`: the class token's attention in the last layer, mean over heads.

The lab's masks are exact. Which vote and which cut is chosen on one split and reported on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from patches import direct, heatmap
from patches.bases import clip
from patches.neuron_cards import Reader, Vote, segment
from training.data.images import Dataset
from training.lab import worlds
from training.segmentation import average_precision

VOTES: tuple[Vote, ...] = ("raw", "signed", "weighted", "effect")
CUTS = ("0.5", "mean")


@dataclass
class Counts:
    """Sums over pictures, from which the three numbers follow."""

    union: Tensor = field(default_factory=lambda: torch.zeros(2))
    overlap: Tensor = field(default_factory=lambda: torch.zeros(2))
    right: float = 0.0
    pixels: int = 0
    precision: float = 0.0
    pictures: int = 0

    def add(self, maps: Tensor, mask: Tensor, cut: str) -> None:
        """maps (B, h, w) between 0 and 1; mask (B, h, w) bool."""
        at = maps.mean((1, 2), keepdim=True) if cut == "mean" else float(cut)
        said = maps > at
        for i, (a, b) in enumerate(((~said, ~mask), (said, mask))):
            self.overlap[i] += float((a & b).sum())
            self.union[i] += float((a | b).sum())
        self.right += float((said == mask).sum())
        self.pixels += mask.numel()
        flat, truth = maps.flatten(1), mask.flatten(1)
        for score, right in ((flat, truth), (1 - flat, ~truth)):
            self.precision += sum(float(average_precision(x, m)) for x, m in zip(score, right, strict=True)) / 2
        self.pictures += len(mask)

    def result(self) -> dict[str, float]:
        """pixel_accuracy, miou, iou of the thing alone, map."""
        iou = self.overlap / self.union.clamp_min(1)
        out = {
            "pixel_accuracy": self.right / max(self.pixels, 1), "miou": float(iou.mean()), "iou": float(iou[1]),
            "map": self.precision / max(self.pictures, 1),
        }  # fmt: skip
        return {k: round(v, 4) for k, v in out.items()}


def laid_over(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) over the picture, between 0 and 1, of maps (B, rows, columns)."""
    big = nnf.interpolate(maps[:, None].float(), tuple(size), mode="bilinear")[:, 0]
    return heatmap.scaled(big)


@torch.inference_mode()
def ways(reader: Reader, x: Tensor, weights: Tensor, heads: direct.Lens, count: int) -> dict[str, Tensor]:
    """way -> (B, rows, columns) for the class that each picture is said to show. weights (k, C) zero-shot."""
    base, rows = reader.base, torch.arange(len(x))
    grid = base.model.visual.grid_size
    y = clip.embed_images(base, x, batch=len(x))
    said, place = torch.unique((y @ weights).argmax(1), return_inverse=True)
    texts = weights.T[said]
    out = {
        f"neurons, {vote}": segment(reader, x, nnf.normalize(texts, dim=1), count, vote)[rows, place]
        for vote in VOTES
        if vote != "effect"
    }
    apart = texts - weights.mean(1)  # as the direct way: what all classes share says nothing of where this one is
    out["neurons, effect"] = segment(reader, x, apart, count, "effect")[rows, place].clamp_min(0)
    maps = heads.maps(x, apart)
    patches = maps.said[..., 1:].sum((1, 2))[rows, place]
    out["direct"] = patches.clamp_min(0).view(-1, *grid)
    out["attention"] = maps.pattern[:, -1, :, 1:].mean(1).view(-1, *grid)
    return out


def table(reader: Reader, data: Dataset, count: int = 200, size: int = 16) -> dict[str, dict[str, float]]:
    """`way, cut` -> its numbers on the thing's mask in each picture."""
    base = reader.base
    weights, heads = clip.zero_shot(base, data.classes), direct.Lens(base)
    count = min(count, sum(len(one.told) for one in reader.cards.layers.values()))
    counts: dict[str, Counts] = {}
    for batch in tqdm(data.batches(size), "masks", total=-(-len(data) // size), disable=None, leave=False):
        x, mask = base.processor.image(batch.image), batch.extras["mask"]
        for way, maps in ways(reader, x, weights, heads, count).items():
            big = laid_over(maps, mask.shape[-2:])
            for cut in CUTS:
                counts.setdefault(f"{way}, {cut}", Counts()).add(big, mask, cut)
    return {way: c.result() for way, c in counts.items()}


def compare(reader: Reader, choose: str, test: str, n: int, seed: int = 0) -> dict[str, Any]:
    """The table on `test` of the lab's single things, and which neuron way `choose` prefers by mIoU."""
    before = table(reader, worlds.WORLDS["imagenet"](choose, n, seed))
    own = {k: v for k, v in before.items() if k.startswith("neurons")}
    best = max(own, key=lambda k: own[k]["miou"])
    after: Mapping[str, Any] = table(reader, worlds.WORLDS["imagenet"](test, n, seed))
    return {"chosen": best, "n": n, choose: before, test: after}
