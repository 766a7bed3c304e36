"""Read and rank neurons: directions, texts and thresholds per layer, and contributions to the wrong class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patches.evidence.neuron_cards import Layer, NeuronCards
from patches.families import clip
from patches.families.base import Base
from patches.families.clip.second_order import (
    Directions,
    EffectMoments,
    NeuronLens,
    lens,
    look,
    scalars,
)
from patches.mechanisms.neurons import NeuronEdit, ablate, replace_effects
from training.data.images import Dataset
from training.data.layouts import named
from training.evidence import thumbnails
from training.lab import atlas
from training.lab.renderer import GROUNDS
from training.progress import tqdm
from training.second_order.config import Config, Edit
from training.second_order.omp import atoms, pursue
from training.tasks import recognition as tasks
from training.tasks.recognition import (
    classifier,
    other_of,
    pictures,
    world,
)
from training.tasks.textspan import read_pool


def sources(config: Config) -> list[Dataset]:
    """Return the image sets for computing directions.

    These are train images of the task with and without the spurious cue, and single objects and crowds, so that neurons
    are not read by the task alone. Real data: the data set itself.
    """
    if named(config.data).folder:
        return list(of_task(config, "train", config.fit_images).values())
    own = list(of_task(config, "train", max(1, config.fit_images // 4)).values())
    left = max(2, config.fit_images - sum(map(len, own)))
    return [*own, world(config, "imagenet", "train", left - left // 2), world(config, "coco", "train", left // 2)]


def of_task(config: Config, split: str, n: int) -> dict[str, Dataset]:
    """Return the task's data sets without the blank strips, from which nothing is learned."""
    return {k: d for k, d in pictures(config, split, n).items() if k != "blank"}


def texts_of(config: Config, data: Dataset) -> tuple[str, ...]:
    """Return the candidate texts: lines of a file, classes of real data, or all names and backgrounds of the lab."""
    if config.pool:
        return read_pool(config.pool)
    return data.classes if named(config.data).folder else tuple(dict.fromkeys([*atlas.load().names, *GROUNDS]))


def batches(data: Sequence[Dataset], size: int = 32) -> Iterator[Tensor]:
    """Yield images (B, 3, H, W) uint8 of all sets, in order."""
    for each in data:
        for batch in each.batches(size):
            yield batch.image


@torch.no_grad()
def read(
    base: Base, config: Config, texts: Sequence[str], thumb: int = 48
) -> tuple[NeuronCards, dict[int, NeuronLens]]:
    """Describe all neurons of the config's layers in one pass over the images; return their cards and lenses."""
    lenses = {layer: lens(base, layer, config.ln) for layer in config.layers}
    data = sources(config)
    keep = max(1, round(config.share * sum(map(len, data))))
    moments = {layer: EffectMoments(at, keep) for layer, at in lenses.items()}
    fired = {layer: torch.zeros(at.neurons, device=base.device) for layer, at in lenses.items()}
    thumbs = []
    bar = tqdm(batches(data), "second-order effects", total=sum(-(-len(d) // 32) for d in data), disable=None)
    for images in bar:
        seen = look(base, base.processor.image(images), config.layers)
        for layer, each in moments.items():
            each.add(scalars(seen, layer))
            fired[layer] += seen.p[layer].mean(1).sum(0)
        thumbs.append(thumbnails(images, thumb))
    pool = clip.embed_texts(base, texts, clip.TEMPLATES)
    dictionary = atoms(pool, config.atom_norm)
    layers = {}
    for layer, each in moments.items():
        known = each.result()
        said = pursue(known.direction, dictionary, min(config.atoms, *dictionary.shape))
        rest = fired[layer] / known.seen
        layers[layer] = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    return NeuronCards(layers, tuple(texts), pool, torch.cat(thumbs), config.ln), lenses


@dataclass(frozen=True)
class Ranked:
    """Neurons of one layer ranked by their effect on the task, with the means to which they are ablated."""

    order: Tensor
    """(N,) int64 neurons, those that favour the wrong class most first"""
    pull: Tensor
    """(N,) ranking score: increase of the neuron's contribution to the wrong class by the spurious cue"""
    effect_mean: Tensor
    """(N, G) mean of the scalars S over clean images, per neuron and later head"""
    fire_mean: Tensor
    """(N,) mean activation over clean images and tokens"""


@dataclass(frozen=True)
class Margins:
    """Contribution of every neuron to the wrong class in each of n images, with mean effects and activations."""

    m: dict[int, Tensor]
    """Layer -> (n, N): <phi_n, t_wrong - t_true> / |y|; for groups <phi_n, t_1 - t_0> / |y|"""
    label: Tensor
    """(n,) index of the true class"""
    other: Tensor
    """(n,) index of the wrong class, or of the place"""
    effect: dict[int, Tensor]
    """Layer -> (N, G) mean of the scalars S"""
    fire: dict[int, Tensor]
    """Layer -> (N,) mean activation over images and tokens"""


@torch.no_grad()
def margins(
    base: Base,
    config: Config,
    lenses: Mapping[int, NeuronLens],
    data: Dataset,
    weights: Tensor,
    other: Tensor | None = None,
) -> Margins:
    """Measure every neuron's contribution to the wrong class in each image.

    weights (k, C): class directions. other (n,): the wrong class of each image, if the data set does not give it.
    """
    says = {layer: at.against(weights.T) for layer, at in lenses.items()}  # (N, G, C)
    m: dict[int, list[Tensor]] = {layer: [] for layer in lenses}
    effect: dict[int, Tensor] = {}
    fire: dict[int, Tensor] = {}
    labels, others, done = [], [], 0
    for batch in data.batches(32):
        seen = look(base, base.processor.image(batch.image), list(lenses))
        wrong = other_of(config, data, batch) if other is None else other[done : done + len(batch)]
        done += len(batch)
        for layer, say in says.items():
            s = scalars(seen, layer)  # (B, G, N)
            if config.task == "typographic":
                apart = (say[..., wrong] - say[..., batch.label]).permute(2, 1, 0)  # (B, G, N)
            else:
                apart = (say[..., 1] - say[..., 0]).T
            m[layer].append((s * apart).sum(1) / seen.y.norm(dim=1)[:, None])
            effect[layer] = effect.get(layer, torch.zeros(())).to(s) + s.sum(0).T
            fire[layer] = fire.get(layer, torch.zeros(())).to(s) + seen.p[layer].mean(1).sum(0)
        labels.append(batch.label)
        others.append(wrong)
    n = len(data)
    return Margins(
        {layer: torch.cat(v) for layer, v in m.items()}, torch.cat(labels), torch.cat(others),
        {layer: v / n for layer, v in effect.items()}, {layer: v / n for layer, v in fire.items()},
    )  # fmt: skip


def rank(
    base: Base, config: Config, lenses: Mapping[int, NeuronLens], data: Mapping[str, Dataset]
) -> dict[int, Ranked]:
    """Rank neurons by how much more they add to the wrong class when the spurious cue is in the image.

    Pairs (clean, attacked): the mean margin of attacked images less that of the same ones clean, both against the
    written word. Groups: how far apart mean margins are by place, less how far by label.
    """
    weights = classifier(base, config, data["clean"]).directions
    if config.task == "typographic":
        hit = margins(base, config, lenses, data["attacked"], weights)
        clean = margins(base, config, lenses, data["clean"], weights, hit.other)
        pull = {layer: hit.m[layer].mean(0) - clean.m[layer].mean(0) for layer in lenses}
    else:
        clean = margins(base, config, lenses, data["clean"], weights)

        def apart(m: Tensor, by: Tensor) -> Tensor:
            return (m[by == 1].mean(0) - m[by == 0].mean(0)).abs()

        pull = {layer: apart(m, clean.other) - apart(m, clean.label) for layer, m in clean.m.items()}
    return {
        layer: Ranked(p.argsort(descending=True), p, clean.effect[layer], clean.fire[layer])
        for layer, p in pull.items()
    }


def matched_control(known: Directions, chosen: Sequence[int], seed: int) -> list[int]:
    """Draw a matched control: for each chosen neuron another of nearly the same spread of effects, ties at random."""
    return tasks.matched_control(known.spread.cpu(), chosen, seed)


def patch_of(
    base: Base, layer: int, at: NeuronLens, known: Directions, found: Ranked, neurons: Sequence[int], edit: Edit
) -> NeuronEdit:
    """Build the edit that sets these neurons to their mean over clean train images."""
    js = list(neurons)
    if edit == "effects":
        return replace_effects(base, at, replace(known, mean=found.effect_mean), js)
    return ablate(clip.site("neurons", layer), js, found.fire_mean[js].clone())
