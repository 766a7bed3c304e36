"""The full report: the sealed patch, its controls and other defences on test."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from patches import artifact
from patches.families import clip
from patches.families.base import Base, load_base
from patches.mechanisms.features import FeatureEdit, edit, load_sae
from registry import config as configs
from training.clip_sae.config import Config
from training.clip_sae.defences import DEFENCES, Defence, judge, pairs
from training.clip_sae.find import mean_direction
from training.clip_sae.measure import measure
from training.clip_sae.streams import streams
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    ask,
    classifier,
    outcomes,
    pictures,
    worth,
)

DEFENCE_PAIRS = 1024
"""pictures of train, with and without a word, that the other defences are fitted on"""


def report(folder: Path, out: Path, seed: int = 0, images: int = 0) -> dict[str, Any]:
    """A sealed patch, its controls, and for the typographic task other defences, on test and in the held style: every
    metric with its interval and n. docs/LOG.md's tables. Writes JSON as it goes. seed: of the test pictures, so that
    a patch made after a look at some can be measured on others; images: of them, 0 for the recipe's own number."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, FeatureEdit)
    fitted = json.loads((folder / "report.json").read_text())
    arms: dict[str, Defence | None] = {"base": None, "clip_sae": Defence(patch, about=fitted["chosen"])}
    if fitted["random"]:
        c, value = patch.config, patch.tensors.get("value", 0.0)
        sae = load_sae(folder / "sae", config.device)
        other = edit(sae, c.site, fitted["random"]["features"], c.op, value, c.tokens)
        arms["random features"] = Defence(other)
    results: dict[str, Any] = {"digest": about.digest, "recipe": sealed["recipe"], "seed": seed, "arms": {}}
    shown = replace(config, seed=seed, test_images=images or config.test_images)
    splits = ("test",) if config.data else ("test", "held")
    sets = {split: pictures(shown, split, shown.test_images) for split in splits}
    for name, defence in tqdm(chain(arms.items(), others(base, config)), "arms", disable=None):
        row: dict[str, Any] = {"about": dict(defence.about) if defence else {}}
        for split, mine in sets.items():
            with defence.patch.apply(base.model, defence.strength) if defence else nullcontext():
                by = classifier(base, config, mine["clean"], defence.templates if defence else clip.TEMPLATES, folder)
                said = {k: ask(base, config, d, by) for k, d in mine.items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
            if "average" in row[split]:
                row[split]["worst_group"] = min(v for k, v in row[split].items() if k != "average")
        results["arms"][name] = row
        out.write_text(json.dumps(results, indent=1))
        tqdm.write(f"{name}: {json.dumps(row)}")
    return results


def others(base: Base, config: Config) -> Iterator[tuple[str, Defence]]:
    """What else keeps CLIP from it, fitted on train and chosen on val at the same bound: the mean direction of the
    best layer, and for the typographic task the defences of training/clip_sae/defences.py."""
    if config.task == "steer":
        return
    layers = tuple(range(len(base.model.visual.transformer.resblocks)))
    config = replace(config, layers=layers, hook="block")
    sizes = {"train": config.fit_images, "val": config.val_images}
    sets = {split: pictures(config, split, n) for split, n in sizes.items()}
    by = classifier(base, config, sets["val"]["clean"])
    seen = {split: {k: streams(base, config, d) for k, d in part.items()} for split, part in sets.items()}
    best: tuple[float, FeatureEdit, dict[str, Any]] | None = None
    for layer in tqdm(layers, "mean direction", disable=None, leave=False):
        tr, va = ({k: s[layer] for k, s in seen[split].items()} for split in sizes)
        patch = mean_direction(config, clip.site("block", layer), tr)
        got = measure(base, config, layer, va, by, patch)
        score = worth(config, got, measure(base, config, layer, va, by, None))
        if best is None or score > best[0]:
            best = score, patch, {"layer": layer, **got}
    assert best is not None
    yield "mean direction", Defence(best[1], about=best[2])
    if config.task == "typographic":
        del seen
        fit_on = pictures(config, "train", DEFENCE_PAIRS)
        train = pairs(base, fit_on["clean"], fit_on["attacked"])
        val = pairs(base, sets["val"]["clean"], sets["val"]["attacked"])
        floor = judge(base, val, None).clean - config.bound
        for name, fitter in DEFENCES.items():
            start = time.monotonic()
            defence = fitter(base, train, val, floor)
            yield name, replace(defence, about={**defence.about, "seconds": round(time.monotonic() - start)})
