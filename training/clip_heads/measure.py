"""Measure a clip_heads edit: task metrics, and every property's probe while each property's heads are ablated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.engine.patch import Patch
from patches.evidence.label_set import LabelSet
from patches.families.base import Base
from patches.families.clip.direct import Lens
from training.clip_heads.config import Config
from training.clip_heads.find import Head
from training.clip_heads.silence import random_heads, silence
from training.data.images import Dataset
from training.lab.probes import PROBES, Probe
from training.progress import tqdm
from training.tasks.recognition import (
    ask,
    metrics,
)


def measure(
    base: Base, config: Config, sets: Mapping[str, Dataset], by: LabelSet, patch: Patch | None
) -> dict[str, float]:
    """Compute the task's metrics with a patch applied to the base."""
    with patch.apply(base.model, root=base.root) if patch else nullcontext():
        return metrics(config, {k: ask(base, config, d, by) for k, d in sets.items()})


def specificity(base: Base, lens: Lens, config: Config, folder: Path, mean: Tensor, count: int = 4) -> dict[str, Any]:
    """Measure every property's probe accuracy on test while the heads of one property are mean-ablated.

    Returns property -> probe -> accuracy with the first `count` heads of the property ablated.

    Controls: the base, and random heads of the same layers (mean, lowest and highest of `draws`). Also which components
    carry each answer directly (`carriers`).
    """
    images = min(300, config.test_images)
    found = json.loads((folder / "heads.json").read_text())
    every = [(h["layer"], h["head"]) for h in found["heads"]]
    sets = {name: probe(base, "test", images, config.seed) for name, probe in PROBES.items()}

    def right(heads: Sequence[Head]) -> dict[str, float]:
        patch = silence(lens, heads, "mean", config.tokens, mean) if heads else None
        with patch.apply(base.model, root=base.root) if patch else nullcontext():
            return {name: probe.accuracy(base) for name, probe in sets.items()}

    out: dict[str, Any] = {"base": right([]), "n": images, "count": count}
    for name in tqdm(PROBES, "properties", disable=None):
        heads = [(a, b) for a, b in found["order"][name][:count]]
        label = {(h["layer"], h["head"]): h["label"] for h in found["heads"]}
        chance = [right(random_heads(heads, every, draw)) for draw in range(config.draws)]
        spread = {k: [r[k] for r in chance] for k in chance[0]} if chance else {}
        out[name] = {
            "heads": heads,
            "named": [label[h] == name for h in heads],
            "without": right(heads),
            "random": {k: [round(sum(v) / len(v), 4), min(v), max(v)] for k, v in spread.items()},
            "carried": carriers(lens, sets[name]),
        }
    return out


@torch.no_grad()
def carriers(lens: Lens, probe: Probe, top: int = 4) -> dict[str, Any]:
    """Decompose the margin of correct answers into direct contributions.

    Returns the shares of all heads, of all MLPs and of constants in the mean of <part, t_right - mean of answers>, and
    the heads with the largest shares. An answer that no head carries cannot be ablated by heads.
    """
    total = torch.zeros(lens.layers, lens.heads)
    mlps = constant = 0.0
    for i in range(0, len(probe.image), 50):
        at = slice(i, i + 50)
        part = lens.read(lens.base.processor.image(probe.image[at]).to(lens.base.device))
        words, right = probe.answers.T, probe.right[at]
        may = words.new_ones(len(right), len(words)) if probe.open is None else probe.open[at].to(words)
        apart = words[right] - may @ words / may.sum(1, keepdim=True)  # (B, k)
        apart = apart.to(part.y) / part.norm[:, None]
        total += torch.einsum("blhk,bk->lh", part.heads, apart).cpu()
        mlps += float(torch.einsum("blk,bk->", part.mlps, apart))
        constant += float(torch.einsum("bk,bk->", part.bias + part.rest, apart))
    whole = float(total.sum()) + mlps + constant
    order = total.flatten().argsort(descending=True)[:top].tolist()
    best = [[i // lens.heads, i % lens.heads, round(float(total.flatten()[i]) / whole, 4)] for i in order]
    shares = {"heads": float(total.sum()), "mlps": mlps, "constants": constant}
    return {**{k: round(v / whole, 4) for k, v in shares.items()}, "best": best}
