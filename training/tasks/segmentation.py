"""Zero-shot segmentation by heat maps: compare heads' direct effects, neurons, raw attention and a trivial baseline.

Protocol of Gandelsman, Efros, Steinhardt, arXiv 2310.05916, section 5.1: the class is the predicted one; its map, less
the mean map of all classes, is resized bilinearly to the image, clipped at zero and thresholded at its own mean. Two
further thresholds: half-way between minimum and maximum (as in arXiv 2406.04341) and Otsu's (as served). Metrics: pixel
accuracy, mean IoU of foreground and background, mean average precision, and pointing (whether the map's maximum lies on
the object). Methods:

- `direct effects`: direct contributions of all heads to the class logit, by source patch (2310.05916); also of the last
  four layers;
- `raw attention`: attention of the class token, averaged over heads, of the last layer or of all;
- `neurons, raw`: activations of the 200 neurons whose direction is nearest the class (2406.04341, as published); also
  times their sign, and times their cosine;
- `neurons, effect` (ours): what all neurons contribute to the class through later heads, by the patch at which they
  fire.

The lab gives two tables: single objects, and one of three objects, asked for by name. A single object is found by any
saliency; among several, only a map that depends on the query can find the right one.

    python -m training.tasks.segmentation lab:clip REPORT.json                        # the lab's masks
    python -m training.tasks.segmentation lab:clip REPORT.json --neurons FOLDER  # and the neurons of a second_order fit
    python -m training.tasks.segmentation open-clip:ViT-L-14/laion2b_s32b_b82k REPORT.json --data FOLDER NAMES.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.evidence.neuron_cards import Reader, Vote, load_neurons, text_maps
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from patches.families.clip.maps import Threshold
from training.data.images import READERS, Dataset
from training.lab import worlds
from training.progress import tqdm
from training.tasks.textspan import read_pool

CUTS: Mapping[str, Threshold] = {"": "mean", ", cut half-way": "half", ", cut by Otsu": "otsu"}
"""Suffix of a row's name -> threshold by which its maps are binarised"""
VOTES: tuple[Vote, ...] = ("raw", "signed", "weighted", "effect")

Way = Callable[[Tensor, Tensor], Tensor]
"""Method: preprocessed images (B, 3, h, w) and class indices (B,) -> heat maps (B, g, g), non-negative or
binary-ready"""


def scores(got: Tensor, mask: Tensor, threshold: Threshold = "mean") -> dict[str, Tensor]:
    """Score thresholded maps `got` (B, g, g) against masks (B, R, R), (B,) each.

    Pixel accuracy, IoU of foreground ("thing") and background ("ground"), and their mean.
    """
    cut = maps.mask(got, threshold, mask.shape[-1])
    out = {"accuracy": (cut == mask).float().mean((1, 2))}
    for name, a, b in (("thing", cut, mask), ("ground", ~cut, ~mask)):
        out[name] = (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp_min(1)
    return {**out, "iou": (out["thing"] + out["ground"]) / 2}


def order(got: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Score maps without a threshold, (B,) each: average precision, and whether the maximum lies on the object."""
    full = maps.resized(got, mask.shape[-1])
    pairs = zip(full.flatten(1), mask.flatten(1), strict=True)
    return {
        "precision": torch.stack([average_precision(x, m) for x, m in pairs]),
        "pointing": mask.flatten(1).gather(1, full.flatten(1).argmax(1, keepdim=True))[:, 0].float(),
    }


def average_precision(score: Tensor, right: Tensor) -> Tensor:
    """Compute the average precision of scores (N,) for the pixels with `right` (N,) bool."""
    order = score.argsort(descending=True)
    hit = right[order].float()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    return (precision * hit).sum() / hit.sum().clamp_min(1)


def ways(lens: Lens, weights: Tensor, reader: Reader | None = None, count: int = 200) -> dict[str, Way]:
    """Return the segmentation methods by name. weights (k, C): zero-shot classifier; count: neurons that vote."""
    mean = weights.mean(1)

    def direct(x: Tensor, which: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        T = weights[:, which].T - mean  # (B, k)
        heads = None if layers is None else [(i, h) for i in layers for h in range(lens.heads)]
        made = [maps.grid(lens, x[i : i + 1], T[i : i + 1], heads)[0, 0] for i in range(len(x))]
        return torch.stack(made).clamp_min(0)

    def neurons(x: Tensor, which: Tensor, vote: Vote) -> Tensor:
        assert reader is not None
        said, place = torch.unique(which, return_inverse=True)
        texts = weights.T[said]
        # as for direct effects, what all classes share does not locate this one; voters are chosen by the class alone
        texts = texts - mean if vote == "effect" else nnf.normalize(texts, dim=1)
        voted = text_maps(reader, x, texts, count, vote)[torch.arange(len(x)), place]
        return voted.clamp_min(0) if vote == "effect" else voted

    last = range(max(0, lens.layers - 4), lens.layers)
    out: dict[str, Way] = {
        "direct effects": direct,
        "direct effects, last four layers": lambda x, which: direct(x, which, last),
        "raw attention, last layer": lambda x, _: maps.attention(lens, x),
        "raw attention, all layers": lambda x, _: maps.attention(lens, x, range(lens.layers)),
    }
    if reader is not None:
        count = min(count, sum(len(one.told) for one in reader.cards.layers.values()))
        out |= {f"neurons, {vote}": partial(neurons, vote=vote) for vote in VOTES}
    side = lens.base.model.visual.grid_size
    return {**out, "nothing is found": lambda x, _: x.new_ones(len(x), *side)}


def table(
    base: Base,
    data: Dataset,
    classes: Sequence[str],
    batch: int = 16,
    named: bool = False,
    reader: Reader | None = None,
) -> dict[str, dict[str, Any]]:
    """Score every method and threshold on a data set: method and threshold -> metric -> [mean, half interval, n].

    named: take the class from the label instead of the model's prediction.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    weights = clip.zero_shot(base, classes)
    how = ways(Lens(base), weights, reader)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in tqdm(data.batches(batch), data.name, total=-(-len(data) // batch), disable=None, leave=False):
            there = part.extras["mask"].flatten(1).any(1)
            yield part.image[there], part.extras["mask"][there], part.label[there]

    for image, mask, label in batches():
        x = base.processor.image(image).to(base.device)
        which = label.to(x.device) if named else (clip.embed_images(base, x, batch=len(x)) @ weights).argmax(1)
        for name, make in how.items():
            got, there = make(x, which).cpu(), mask.cpu()
            same = order(got, there)
            for ending, cut in CUTS.items():
                row = found.setdefault(name + ending, {})
                for key, value in {**scores(got, there, cut), **same}.items():
                    row.setdefault(key, []).append(value)
    out: dict[str, dict[str, Any]] = {}
    for name, columns in found.items():
        for key, parts in columns.items():
            v = torch.cat(parts)
            half = 1.96 * float(v.std()) / len(v) ** 0.5
            out.setdefault(name, {})[key] = [round(float(v.mean()), 4), round(half, 4), len(v)]
    return out


def lab(base: Base, split: worlds.Split, n: int, seed: int = 0, reader: Reader | None = None) -> dict[str, Any]:
    """Compute the lab's two tables: single objects, and one of three objects asked for by name."""
    single, crowd = worlds.imagenet(split, n, seed), worlds.coco(split, n, seed)
    return {
        "single things": table(base, single, worlds.imagenet_classes(), reader=reader),
        "one of three things": table(base, crowd, worlds.coco_classes(), named=True, reader=reader),
    }


def main(words: Sequence[str]) -> None:
    """Run the command line: base reference, output file, `--neurons FOLDER`, `--data FOLDER NAMES`."""
    parser = argparse.ArgumentParser(prog="python -m training.tasks.segmentation")
    parser.add_argument("base", help="reference of a CLIP")
    parser.add_argument("report", type=Path, help="JSON file to write")
    parser.add_argument("--neurons", type=Path, help="folder of a second_order fit")
    parser.add_argument("--data", nargs=2, metavar=("FOLDER", "NAMES"), help="ImageNet-Seg's layout, and class names")
    asked = parser.parse_args(words)
    base = load_base(asked.base, "clip")
    base.model.requires_grad_(False)
    reader = Reader.of(base, load_neurons(asked.neurons)) if asked.neurons else None
    if asked.data:
        folder, names = asked.data
        tables = {"things": table(base, READERS["imagenet_seg"](folder), read_pool(names), reader=reader)}
    else:
        tables = lab(base, "test", 300, reader=reader)
    asked.report.write_text(json.dumps(tables, indent=1))
    for title, got in tables.items():
        for name, row in got.items():
            sys.stdout.write(f"{title}, {name}: {row}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
