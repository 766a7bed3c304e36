"""Full report of clip_sae: the sealed patch, its controls and other defences on test."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from patches.families import clip
from patches.families.base import Base
from patches.mechanisms.features import FeatureEdit, edit
from patches.sae_files import load_sae
from training import choose
from training.clip_sae.config import Config
from training.clip_sae.defences import DEFENCES, accuracies, pairs
from training.clip_sae.find import mean_direction
from training.clip_sae.measure import measure
from training.clip_sae.streams import streams
from training.evidence import Draft, open_patch
from training.progress import tqdm
from training.tasks.recognition import (
    Arm,
    classifier,
    pictures,
    report_arms,
    worth,
)

DEFENCE_PAIRS = 1024
"""Number of train pairs (with and without a word) on which the other defences are fitted"""


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Measure a sealed patch, its controls and other defences (typographic task) on test and in the held-out style.

    config: how to measure. Controls are fitted by the sealed config, so `seed` and `test_images` can draw images that
    nobody has looked at (`patchbay eval REF --full seed=1 test_images=2000`).
    """
    opened = open_patch(folder, config.base, config.device)
    patch, fitted, sealed = opened.patch, opened.fitted, replace(opened.recipe.config, device=config.device)
    assert isinstance(patch, FeatureEdit)
    arms = {"base": Arm(), "clip_sae": Arm(patch, about=fitted["chosen"])}
    if fitted["random"]:
        c, value = patch.config, patch.tensors.get("value", 0.0)
        sae = load_sae(folder / "sae", config.device)
        arms["random features"] = Arm(edit(sae, c.site, fitted["random"]["features"], c.op, value, c.tokens))
    draft = Draft(opened.about)
    every = chain(arms.items(), others(opened.base, sealed))
    report_arms(opened.base, config, every, folder, draft, by_hand=("clip_sae", "base", "prefix", "projection"))
    return draft


def others(base: Base, config: Config) -> Iterator[tuple[str, Arm]]:
    """Yield other methods for the same task, fitted on train and chosen on val within the same bound.

    These are the mean direction of the best layer, and for the typographic task the defences of
    training/clip_sae/defences.py.
    """
    if config.task == "steer":
        return
    layers = tuple(range(len(base.model.visual.transformer.resblocks)))
    config = replace(config, layers=layers, hook="block")
    sizes = {"train": config.fit_images, "val": config.val_images}
    sets = {split: pictures(config, split, n, varied=config.varied) for split, n in sizes.items()}
    by = classifier(base, config, sets["val"]["clean"])
    seen = {split: {k: streams(base, config, d) for k, d in part.items()} for split, part in sets.items()}
    offers = []
    for layer in tqdm(layers, "mean direction", disable=None, leave=False):
        tr, va = ({k: s[layer] for k, s in seen[split].items()} for split in sizes)
        patch = mean_direction(config, clip.site("block", layer), tr)
        got, plain = (measure(base, config, layer, va, by, one) for one in (patch, None))
        offers.append(choose.Offer(patch, {"layer": layer, **got, "worth": worth(config, got, plain)}))
    best = choose.best(offers)
    yield "mean direction", Arm(best.what, about=best.row)
    if config.task == "typographic":
        del seen
        fit_on = pictures(config, "train", DEFENCE_PAIRS, varied=config.varied)
        train = pairs(base, fit_on["clean"], fit_on["attacked"])
        val = pairs(base, sets["val"]["clean"], sets["val"]["attacked"])
        floor = accuracies(base, val, None).clean - config.bound
        for name, fitter in DEFENCES.items():
            start = time.monotonic()
            defence = fitter(base, train, val, floor)
            yield name, replace(defence, about={**defence.about, "seconds": round(time.monotonic() - start)})
