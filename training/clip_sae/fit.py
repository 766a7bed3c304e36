"""Fit clip_sae: a dictionary per layer, candidate edits from the train split, the choice on val, the sealed folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from patches import artifact
from patches.evidence import write_evidence
from patches.evidence.feature_cards import save_cards
from patches.evidence.label_set import LabelSet
from patches.families import clip
from patches.families.base import Base, load_base, slug
from patches.mechanisms.features import SAE, FeatureEdit, Op, edit
from patches.sae_files import load_sae, save_sae
from registry import manifest
from registry.errors import ConfigError
from registry.home import home
from registry.manifest import Manifest, digest_of
from training.choose import Offer, best
from training.clip_sae import cards
from training.clip_sae.config import Config
from training.clip_sae.dictionary import activations
from training.clip_sae.find import by_difference, largest, lessons, mean_direction, mean_fire, orders, random_control
from training.clip_sae.gates import learn
from training.clip_sae.measure import measure, quality, steerable
from training.clip_sae.streams import Stream, streams
from training.clip_sae.train import train
from training.data.images import Dataset
from training.data.layouts import named
from training.progress import tqdm
from training.tasks.recognition import (
    KEPT,
    affordable,
    classifier,
    examples,
    pictures,
    seal_labels,
    world,
    worth,
)


def dictionary_of(base: Base, config: Config, layer: int) -> tuple[SAE, list[dict[str, float]]]:
    """Load or train the dictionary of a layer; return it with its training curve."""
    site = clip.site(config.hook, layer)
    if config.dictionary:
        place = config.dictionary.replace("{layer}", str(layer))
        if not place.startswith("lab:"):
            return replace(load_sae(Path(place), config.device), site=site), []
        folder = clip.SHIPPED / slug(place.removeprefix("lab:"))
        manifest.read(folder, base=base.digest)
        shipped = load_sae(folder, config.device)
        if shipped.site != site:
            raise ConfigError(f"{place} was trained at {shipped.site}, not at {site}. Leave `layers` and `hook` alone.")
        return shipped, []
    mark = digest_of([asdict(config.sae), base.digest, site, config.which, config.task, config.data, config.chunk])
    checkpoint = home() / "checkpoints" / f"sae-{mark[:16]}.safetensors"
    chunks = activations(base.model, site, _stream(base, config), config.which)
    trained = train(config.sae, chunks, site, config.device, checkpoint, label=f"SAE of layer {layer}")
    checkpoint.unlink(missing_ok=True)
    return trained


def _stream(base: Base, config: Config) -> Callable[[int], Tensor]:
    """Return a function from chunk number to training images.

    Half of them are from the task's own world, a quarter each single objects and crowds, so that the dictionary is not
    specific to the task. Real data: the data set, reshuffled each time.
    """
    main = {"steer": "imagenet"}.get(config.task, config.task)

    def chunk(number: int) -> Tensor:
        seed = 1000 + number
        if named(config.data).folder:
            parts = [world(config, main, "train", config.chunk, seed, **_words(main, number))]
        else:
            shares = ((main, config.chunk // 2), ("imagenet", config.chunk // 4), ("coco", config.chunk // 4))
            parts = [world(config, w, "train", n, seed, **_words(w, number)) for w, n in shares]
        pictures = torch.cat([part.read(range(len(part))).image for part in parts])
        ready: Tensor = base.processor.image(pictures)
        return ready.to(base.device)

    return chunk


def _words(world: str, number: int) -> dict[str, str]:
    return {"word": ("wrong", "own", "none")[number % 3]} if world == "typographic" else {}


def fit(config: Config, folder: Path) -> Manifest:
    """Train the dictionaries, rank their features on train, choose on val, seal the best edit with its evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    main, *folds = (view(base, config, fold) for fold in ("", *config.folds))
    data, by = main.data, main.by
    found: dict[str, Any] = {"task": config.task, "layers": {}, "candidates": []}
    taken: tuple[Offer[FeatureEdit], SAE] | None = None
    for layer in config.layers:
        sae, curve = dictionary_of(base, config, layer)
        tr, va = main.at("train", layer), main.at("val", layer)
        judge = partial(measure, base, config, layer, va, by["val"])
        plain = judge(None)
        elsewhere = [worths(base, config, layer, sae, one) for one in folds]
        offers: list[Offer[FeatureEdit]] = []
        for row, patch in candidates(base, config, layer, sae, tr, by["train"]):
            others = [one.get(tuple(row.items()), -1.0) for one in elsewhere]  # -1: a fold that lacks this candidate
            row |= (got := judge(patch)) | {"worth": fmean([worth(config, got, plain), *others])}
            row |= {"folds": dict(zip(config.folds, others, strict=True))} if others else {}
            found["candidates"].append(row)
            offers.append(Offer(patch, row, got.get(KEPT[config.task], 0.0), len(patch.config.features)))
        mine = best(offers, config.within)
        about = {"curve": curve, "base": plain, **quality(base, layer, sae, va["clean"], by["val"])}
        if config.op != "add":
            control = random_control(sae, mine.what, tr["clean"], config.seed)
            about["random"] = {"features": control.config.features, **judge(control)}
        if config.task != "steer":
            about["mean_direction"] = judge(mean_direction(config, clip.site(config.hook, layer), tr))
        if config.steer_features:
            about["steerability"] = steerable(base, config, layer, sae, va["clean"])
        found["layers"][str(layer)] = about
        if taken is None or mine.score > taken[0].score:
            taken = mine, sae
    assert taken is not None
    (chosen, sae) = taken
    patch, found["chosen"] = chosen.what, chosen.row
    found["random"] = found["layers"][str(found["chosen"]["layer"])].get("random")
    found["examples"] = examples(base, config, data["val"], by["val"], patch, folder)
    save_sae(sae, folder / "sae")
    seal_labels(config, by["val"], folder)
    shown = data["train"].get("attacked", data["train"]["clean"])
    save_cards(cards.make_cards(base, sae, patch.config.site, shown, shown.classes), folder)
    write_evidence(folder, found)
    return artifact.save(patch, "clip_sae", folder, base=base.label)


@dataclass(frozen=True)
class View:
    """Train and val splits of one fold: candidates are made on train and judged on val."""

    data: dict[str, dict[str, Dataset]]
    """Split -> name -> data set"""
    by: dict[str, LabelSet]
    """Split -> classifier"""
    seen: dict[str, dict[str, dict[int, Stream]]]
    """Split -> name -> layer -> recorded activations"""

    def at(self, split: str, layer: int) -> dict[str, Stream]:
        """Return a split's recorded activations of one layer, by data set."""
        return {k: s[layer] for k, s in self.seen[split].items()}


def view(base: Base, config: Config, fold: str = "") -> View:
    """Draw a fold's data, fit its classifier and record its activations."""
    sizes = {"train": config.fit_images, "val": config.val_images}
    data = {split: pictures(config, split, n, fold, config.varied) for split, n in sizes.items()}
    data["train"].pop("blank", None)  # only measured; nothing is learned from it
    by = {split: classifier(base, config, sets["clean"], fold=fold) for split, sets in data.items()}
    seen = {split: {k: streams(base, config, d) for k, d in sets.items()} for split, sets in data.items()}
    return View(data, by, seen)


def worths(base: Base, config: Config, layer: int, sae: SAE, one: View) -> dict[tuple[tuple[str, Any], ...], float]:
    """Compute each candidate's worth on a fold that holds out another illustrator, by the candidate's description."""
    judge = partial(measure, base, config, layer, one.at("val", layer), one.by["val"])
    plain, offered = judge(None), candidates(base, config, layer, sae, one.at("train", layer), one.by["train"])
    return {tuple(row.items()): worth(config, judge(patch), plain) for row, patch in offered}


def candidates(
    base: Base, config: Config, layer: int, sae: SAE, seen: Mapping[str, Stream], by: LabelSet
) -> Iterator[tuple[dict[str, Any], FeatureEdit]]:
    """Yield the candidate edits of a layer by ranking and number of features, made from the train split alone."""
    top = largest(sae, seen["clean"])
    mean = mean_fire(sae, seen["clean"]) if any(config.levels) else top
    gates = torch.ones_like(sae.bias)
    if "gates" in config.ranks and config.task != "steer":
        edited = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[config.tokens]
        hard, kept = lessons(base, config, layer, seen, by)
        free = torch.ones_like(sae.bias, dtype=torch.bool)
        if config.gates.among:
            differ = by_difference(config, sae, seen).argsort(descending=True)
            free[differ[config.gates.among :]] = False
        gates = learn(config.gates, sae, hard, kept, edited, free, f"gates of layer {layer}")
    for how, order in orders(base, config, layer, sae, seen, by, gates).items():
        counts = [n for n in affordable(config.counts, len(sae.bias)) if n <= len(order)] or [len(order)]
        for count in tqdm(counts, f"layer {layer}, {how}", disable=None, leave=False):
            chosen, site = order[:count].tolist(), clip.site(config.hook, layer)
            row = {"layer": layer, "rank": how, "count": count}
            if how == "gates":
                for strength in config.strengths:
                    left = 1 - strength * (1 - gates[chosen])
                    yield {**row, "strength": strength}, edit(sae, site, chosen, "scale", left, config.tokens)
            elif config.op == "zero":
                for level in config.levels:
                    op: Op = "clamp" if level else "zero"
                    yield {**row, "level": level}, edit(sae, site, chosen, op, level * mean[chosen], config.tokens)
            else:
                value = config.value if config.op == "scale" else config.value * top[chosen]
                yield row, edit(sae, site, chosen, config.op, value, config.tokens)
