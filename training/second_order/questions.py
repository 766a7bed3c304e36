"""The paper's open questions: how much one direction explains, what the lens leaves out, who carries a neuron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.engine.read import record
from patches.evidence.neuron_cards import NeuronCards
from patches.families import clip
from patches.families.base import Base
from patches.families.clip.second_order import (
    MOVES,
    Moves,
    NeuronLens,
    Replacement,
    follow,
    look,
    replaced,
    scalars,
)
from training.data.images import Dataset
from training.progress import tqdm
from training.second_order.config import Config
from training.tasks.recognition import (
    world,
)

REPLACEMENTS: tuple[Replacement, ...] = ("mean", "significant", "insignificant", "rank1")


@torch.no_grad()
def ablations(base: Base, cards: NeuronCards, lenses: Mapping[int, NeuronLens], data: Dataset, weights: Tensor) -> Any:
    """Measure zero-shot accuracy with all effects of a layer replaced (section 4 of the paper), layer by layer.

    Also the fraction of images in which an effect is significant.
    """
    right: dict[int, dict[str, int]] = {layer: dict.fromkeys(REPLACEMENTS, 0) for layer in lenses}
    base_right, counted = 0, dict.fromkeys(lenses, 0.0)
    for batch in data.batches(32):
        seen = look(base, base.processor.image(batch.image), list(lenses))
        label = batch.label.to(seen.y.device)
        base_right += int(((seen.y @ weights).argmax(1) == label).sum())
        for layer, at in lenses.items():
            known, s = cards.layers[layer].known, scalars(seen, layer)
            counted[layer] += float(known.significant(known.centred(at, s)).float().mean(0).sum())
            for how in REPLACEMENTS:
                y = seen.y + replaced(at, known, s, how)
                right[layer][how] += int(((y @ weights).argmax(1) == label).sum())
    n = len(data)
    share = {str(k): {**{how: c / n for how, c in v.items()}, "counts_share": counted[k] / n} for k, v in right.items()}
    return {"base": base_right / n, "n": n, "layers": share}


@torch.no_grad()
def linearisation(
    base: Base, cards: NeuronCards, at: NeuronLens, images: Tensor, neurons: Sequence[int]
) -> dict[str, Any]:
    """Compare the lens with true mean-ablation of a neuron while what the lens holds fixed is released step by step.

    Per step: |phi - change|^2 over |change|^2, both relative to the neuron's mean activation, summed over neurons and
    images; their mean cosine; and the step's fraction of the final change's energy.
    """
    layer = at.layer
    rest = cards.layers[layer].rest
    x = base.processor.image(images)
    with (
        record(base.model, [clip.site("block", layer)]) as z,
        record(base.model, [clip.site("neurons", layer)], "input") as p,
    ):
        clip.embed_images(base, x, batch=len(x))
    stream, fire = z[clip.site("block", layer)][0].float(), p[clip.site("neurons", layer)][0].float()
    w = base.model.visual.transformer.resblocks[layer].mlp.c_proj.weight.float()
    steps: list[tuple[str, tuple[Moves, ...]]] = [("lens", ())]
    steps += [(m, MOVES[: i + 1]) for i, m in enumerate(MOVES)]
    got: dict[str, list[Tensor]] = {name: [] for name, _ in steps}
    for n in tqdm(neurons, f"paths of layer {layer}", disable=None, leave=False):
        delta = (rest[n] - fire[..., n])[..., None] * w[:, n]  # mean-ablation of one neuron at every token
        for name, moves in steps:
            got[name].append(follow(base, layer, stream, delta, moves))
    phi = torch.stack(got["lens"])
    last = torch.stack(got[steps[-1][0]]).square().sum()
    out = {}
    for name, _ in steps[1:]:
        true = torch.stack(got[name])
        out[name] = {
            "error": float((phi - true).square().sum() / true.square().sum()),
            "cosine": float(nnf.cosine_similarity(phi, true, dim=-1).mean()),
            "energy": float(true.square().sum() / last),
        }
    return {
        "steps": out,
        "neurons": len(neurons),
        "pictures": len(images),
        "lens_energy": float(phi.square().sum() / last),
    }


def questions(base: Base, config: Config, cards: NeuronCards, lenses: Mapping[int, NeuronLens]) -> dict[str, Any]:
    """Answer the paper's open questions on val: variance along one direction, error of the lens, carrying heads."""
    images = world(config, _plain(config), "val", config.val_images)
    weights = clip.zero_shot(base, images.classes)
    out: dict[str, Any] = {"ablations": ablations(base, cards, lenses, images, weights), "layers": {}}
    g = torch.Generator().manual_seed(config.seed)
    few = images.read(range(min(len(images), config.probes))).image
    for layer, at in lenses.items():
        one = cards.layers[layer]
        known = one.known
        heavy = known.spread.topk(min(config.probes, at.neurons)).indices.tolist()
        drawn = torch.randperm(at.neurons, generator=g)[: config.probes].tolist()
        main = known.carriers.amax(1)
        out["layers"][str(layer)] = {
            "directions": known.axis.shape[1],
            "explained": _summary(known.explained[:, 0]),
            "explained_all": _summary(known.explained_all),
            "texts_explain": _summary(one.told),
            "proved": float(known.exact.float().mean()),
            "main_carrier": _summary(main),
            "carried_by": known.carriers.mean(0).view(-1, at.heads).tolist(),
            "paths": {
                "heavy": linearisation(base, cards, at, few, heavy),
                "random": linearisation(base, cards, at, few, drawn),
            },
        }
    return out


def _plain(config: Config) -> str:
    """Return the name of the world of clean images on which zero-shot accuracy is measured."""
    return "imagenet" if not config.data or config.task in ("typographic", "steer") else config.task


BINS = 20


def _summary(x: Tensor) -> dict[str, Any]:
    """Summarise fractions x (N,) over neurons: mean, quartiles and a histogram."""
    x = x.float().cpu().clamp(0, 1)
    quartiles = [round(float(v), 4) for v in x.quantile(torch.tensor([0.25, 0.5, 0.75]))]
    return {"mean": round(float(x.mean()), 4), "quartiles": quartiles, "histogram": x.histc(BINS, 0, 1).long().tolist()}
