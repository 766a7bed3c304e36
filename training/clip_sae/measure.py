"""Measure a clip_sae edit: task metrics, steerability of features, quality of a dictionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.base import Base
from patches.mechanisms.features import SAE, FeatureEdit
from training.clip_sae.config import Config
from training.clip_sae.find import largest, steering
from training.clip_sae.quality import Quality, principal_variance
from training.clip_sae.streams import Stream, answers, applied
from training.data import images as readers
from training.data.layouts import named
from training.lab import atlas
from training.tasks.intervals import share
from training.tasks.recognition import metrics


def measure(
    base: Base,
    config: Config,
    layer: int,
    seen: Mapping[str, Stream],
    by: LabelSet,
    patch: FeatureEdit | None,
) -> dict[str, float]:
    """Compute the task's metrics from recorded activations, with the patch applied at its site."""
    change = applied(patch) if patch else lambda x: x
    return metrics(config, {k: answers(base, layer, s, by, change) for k, s in seen.items()})


STEER_IMAGES = 16
"""Number of images for comparing features with neurons"""


@torch.no_grad()
def steerable(
    base: Base, config: Config, layer: int, sae: SAE, stream: Stream
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare how often features, single dimensions ("neurons") and random directions steer at the same values.

    Returns kind -> strength -> summary.

    Values are multiples of the tokens' mean norm; the config's number of each kind is drawn at random.
    """
    folder = named(config.data).folder
    names = readers.imagenet(folder, "val").classes if folder else atlas.load().names
    words = clip.embed_texts(base, names)
    few = next(stream.parts(STEER_IMAGES))
    g = torch.Generator().manual_seed(config.seed)
    alive = (largest(sae, stream) > 0).nonzero()[:, 0]
    F = alive[torch.randperm(len(alive), generator=g)[: config.steer_features]]
    n, width = config.steer_features, stream.x.shape[-1]
    neurons = torch.eye(width)[torch.randperm(width, generator=g)[:n]].to(few.x)
    drawn = nnf.normalize(torch.randn(n, width, generator=g), dim=1).to(few.x)
    norm = stream.size()
    kinds: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "features": (sae.decoder[F], lambda x: sae.encode(x)[..., F]),
        "neurons": (neurons, lambda x: x @ neurons.T),
        "random": (drawn, lambda x: x @ drawn.T),
    }
    about = {"pictures": len(few), "words": len(names), "norm": norm}
    out: dict[str, dict[str, dict[str, float]]] = {}
    for kind, (rows, code) in kinds.items():
        size = {"of": len(alive) if kind == "features" else width}
        out[kind] = {}
        for strength in config.steer_strengths:
            value = torch.full((len(rows),), strength * norm).to(rows)
            got = steering(base, layer, few, rows, code, value, words)
            out[kind][f"{strength:g}"] = {**got.summary(), **about, **size}
    return out


@torch.no_grad()
def quality(base: Base, layer: int, sae: SAE, stream: Stream, by: LabelSet) -> dict[str, Any]:
    """Measure a dictionary's quality on recorded activations.

    Returns `Quality`, the variance explained by as many principal components, and the cross-entropy recovered between
    zero ablation and clean, at the model's own logit scale.
    """
    seen = Quality(sae)
    for part in stream.parts():
        seen.add(part.x)
    out = seen.result()
    flat = stream.x.flatten(0, 1)[:: max(1, stream.x[..., 0].numel() // 8192)].to(stream.here, torch.float32)
    out["principal_variance"] = principal_variance(flat, max(1, round(out["all"]["l0_mean"])))

    def loss(change: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        said = answers(base, layer, stream, by, change).logits
        return float(nnf.cross_entropy(said, stream.label.cpu())), said.argmax(1)

    (clean, before), (back, after) = loss(lambda x: x), loss(lambda x: sae.decode(sae.encode(x), x).to(x))
    zero, _ = loss(torch.zeros_like)
    out["ce"] = {"clean": clean, "sae": back, "zero": zero, "recovered": (zero - back) / (zero - clean)}
    out["top1_kept"] = share(before == after).value
    return out
