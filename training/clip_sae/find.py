"""Rank the features of a dictionary by how much they carry the spurious cue, and draw matched controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.evidence.label_set import LabelSet
from patches.families.base import Base
from patches.mechanisms.features import SAE, FeatureEdit, edit
from registry.errors import ConfigError
from training.clip_sae.config import Config
from training.clip_sae.gates import Lesson
from training.clip_sae.steerability import Steerability, after_block, after_last_block
from training.clip_sae.streams import Stream, answers, finish
from training.tasks import recognition as tasks


@torch.no_grad()
def fires(sae: SAE, stream: Stream) -> Tensor:
    """Sum every feature's activation over tokens: (n, F)."""
    return torch.cat([sae.encode(part.x).sum(1) for part in stream.parts()])


def by_difference(config: Config, sae: SAE, seen: Mapping[str, Stream]) -> Tensor:
    """Score each feature (F,) by how much more it fires with the spurious cue, relative to how much it fires anyway.

    Pairs (clean, attacked): the mean increase over the clean mean, which ranks features needed by clean images last
    (divided by the increase's standard deviation instead, 300 features cost 4 points of clean accuracy; so, none: n =
    160 of val). Groups: |Cohen's d| by place less that by label, which ranks features of the class itself last.
    """
    if config.task == "typographic":
        hit, plain = (fires(sae, seen[name]).mean(0) for name in ("attacked", "clean"))
        usual = plain[plain > 0].median() if bool((plain > 0).any()) else 1.0
        return (hit - plain) / (plain + usual)
    f, clean = fires(sae, seen["clean"]), seen["clean"]

    def apart(by: Tensor) -> Tensor:
        one, two = f[by == 1], f[by == 0]
        spread = ((one.var(0) + two.var(0)) / 2).sqrt()
        return ((one.mean(0) - two.mean(0)) / (spread + 0.05 * spread.max())).abs()

    return apart(clean.other) - apart(clean.label)


def by_effect(base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet) -> Tensor:
    """Estimate the first-order effect (F,) of removing each feature on the log-probability of the true class.

    -f_j <W_j, gradient> summed over tokens, averaged over images with the spurious cue (attacked, or groups weighted
    equally) and over clean ones: a feature that clean images need loses what it gains.
    """
    total = torch.zeros(len(sae.bias))
    for stream in seen.values():
        weight = torch.full((len(stream),), 1 / len(stream))
        if config.task in ("waterbirds", "celeba"):
            group = 2 * stream.label + stream.other
            weight = 1 / group.bincount(minlength=4).clamp_min(1)[group].float()
        for part, mine in zip(stream.parts(), torch.split(weight, 32), strict=True):
            x = part.x.detach().requires_grad_()
            with torch.enable_grad():
                right = finish(base, layer, part, x, by).log_softmax(1).gather(1, part.label[:, None])[:, 0]
                (slope,) = torch.autograd.grad((right * mine.to(right)).sum(), x)
            total -= (sae.encode(part.x) * (slope @ sae.decoder.T)).sum((0, 1)).cpu()
    return total


def lessons(
    base: Base, config: Config, layer: int, seen: Mapping[str, Stream], by: LabelSet
) -> tuple[list[Lesson], list[Lesson]]:
    """Return training batches for gates: images with the spurious cue, and clean images to be kept.

    Groups are weighted by the base's error rate. Kept are clean images that the base classifies correctly, since only
    those predictions have to be preserved.
    """
    paired = config.task == "typographic"

    def some(stream: Stream, weight: Tensor, written: bool = False) -> list[Lesson]:
        size = config.gates.batch
        parts = zip(stream.parts(size), torch.split(weight, size), strict=True)
        return [
            Lesson(p.x, partial(finish, base, layer, p, by=by), p.label, w, p.other if written else None)
            for p, w in parts
        ]

    hard, clean = seen["attacked" if paired else "clean"], seen["clean"]
    weight = torch.ones(len(hard), device=hard.here)
    said = answers(base, layer, clean, by, lambda x: x).logits.argmax(1)
    right = said.to(clean.label) == clean.label
    if not paired:  # weight groups by the number of the base's errors, whatever their size
        group = 2 * hard.label + hard.other
        size, wrong = (group.bincount(w, minlength=4) for w in (torch.ones_like(weight), (~right).float()))
        weight = (wrong / size.clamp_min(1) ** 2)[group]
        weight = weight / weight.mean() if bool(weight.any()) else torch.ones_like(weight)
    kept = clean.rows(right.nonzero()[:, 0]) if bool(right.any()) else clean
    return some(hard, weight, paired), some(kept, torch.ones(len(kept), device=kept.here))


def matched_control(sae: SAE, stream: Stream, chosen: Sequence[int], seed: int) -> list[int]:
    """Draw a matched control: for each chosen feature another of nearly the same mean activation, ties at random."""
    return tasks.matched_control(fires(sae, stream).mean(0).cpu(), chosen, seed)


def mean_direction(config: Config, site: str, seen: Mapping[str, Stream]) -> FeatureEdit:
    """Build a control without a dictionary: project out the difference of mean activations with and without the cue."""
    clean = seen["clean"]
    if config.task == "typographic":
        one, two = seen["attacked"].mean(), clean.mean()
    else:
        one, two = (clean.rows((clean.other == p).nonzero()[:, 0]).mean() for p in (1, 0))
    way = nnf.normalize(one - two, dim=0)[None]
    rank_one = SAE(way, -(way @ two), way, torch.zeros_like(two))
    return edit(rank_one, site, [0], "zero", tokens=config.tokens)


def largest(sae: SAE, stream: Stream) -> Tensor:
    """Return the largest activation of each feature, (F,)."""
    return torch.stack([sae.encode(part.x).amax((0, 1)) for part in stream.parts()]).amax(0)


def mean_fire(sae: SAE, stream: Stream) -> Tensor:
    """Return the mean activation (F,) of each feature, weighting all groups (label, cue) equally."""
    group = 2 * stream.label + stream.other
    at = [(group == g).nonzero()[:, 0] for g in sorted(set(group.tolist()))]
    return torch.stack([fires(sae, stream.rows(i)).mean(0) for i in at]).mean(0) / stream.x.shape[1]


def random_control(sae: SAE, patch: FeatureEdit, stream: Stream, seed: int) -> FeatureEdit:
    """Build the control edit: the same operation on as many other features of the same mean activation."""
    c = patch.config
    other = matched_control(sae, stream, c.features, seed)
    return edit(sae, c.site, other, c.op, patch.tensors.get("value", 0.0), c.tokens)


def orders(
    base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet, gates: Tensor
) -> dict[str, Tensor]:
    """Order features by each ranking, best first. For task=steer: those whose concept is the word, strongest first."""
    if config.task == "steer":
        clean = seen["clean"]
        top = config.value * largest(sae, clean)
        got = steering(base, layer, clean, sae.decoder, sae.encode, top, by.weights.T)
        mine = (got.concept == int(clean.other[0])).nonzero()[:, 0]
        if not len(mine):
            raise ConfigError(f"No feature of layer {layer} steers to {config.word!r}. Take another word or layer.")
        return {"concept": mine[got.power[mine].argsort(descending=True)]}
    scores = {
        "difference": lambda: by_difference(config, sae, seen),
        "effect": lambda: by_effect(base, config, layer, sae, seen, by),
        "gates": lambda: 1 - gates,
    }
    return {how: scores[how]().argsort(descending=True) for how in config.ranks}


def steering(
    base: Base, layer: int, stream: Stream, rows: Tensor, code: Callable[[Tensor], Tensor], value: Tensor, words: Tensor
) -> Steerability:
    """Measure how much the directions `rows` (F, D) steer when activations code(x) (..., F) are set to `value` (F,)."""
    if layer == len(base.model.visual.transformer.resblocks) - 1:
        return after_last_block(base, stream.z[:, 0], rows, code(stream.x[:, 0]), value, words, quiet=False)
    f = code(stream.x)
    return after_block(base, layer, stream.z, rows, lambda at: f[..., at], value, words, quiet=False)
