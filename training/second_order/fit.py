"""Fit second_order: read and rank neurons on train, choose the edit on val, seal the folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from patches import artifact
from patches.evidence import write_evidence
from patches.evidence.neuron_cards import save_neurons
from patches.families.base import load_base
from patches.families.clip.second_order import (
    NeuronLens,
)
from patches.mechanisms.neurons import NeuronEdit
from registry.manifest import Manifest
from training.choose import Offer, best
from training.progress import tqdm
from training.second_order.config import Config, Edit
from training.second_order.find import matched_control, of_task, patch_of, rank, read, texts_of
from training.second_order.measure import measure
from training.second_order.questions import questions
from training.tasks.recognition import (
    KEPT,
    affordable,
    classifier,
    examples,
    pictures,
    seal_labels,
    worth,
)


def fit(config: Config, folder: Path) -> Manifest:
    """Read the neurons, rank them on train, choose the edit on val, seal it with cards and evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    train = of_task(config, "train", config.rank_images)
    val = pictures(config, "val", config.val_images)
    by = classifier(base, config, val["clean"])
    cards, lenses = read(base, config, texts_of(config, train["clean"]))
    ranked = rank(base, config, lenses, train)
    found: dict[str, Any] = {"task": config.task, "base": measure(base, config, val, by, None)}
    offers: list[Offer[NeuronEdit]] = []
    for layer, edit, count in candidates(config, lenses):
        js = ranked[layer].order[:count].tolist()
        patch = patch_of(base, layer, lenses[layer], cards.layers[layer].known, ranked[layer], js, edit)
        got = measure(base, config, val, by, patch)
        about = {"layer": layer, "edit": edit, "count": count}
        row = {**about, **got, "worth": worth(config, got, found["base"])}
        offers.append(Offer(patch, row, got.get(KEPT[config.task], 0.0), count))
    found["candidates"] = [o.row for o in offers]
    taken = best(offers)
    patch, chosen = taken.what, taken.row
    layer, known = chosen["layer"], cards.layers[chosen["layer"]].known
    found["chosen"] = chosen
    other = matched_control(known, patch.config.neurons, config.seed)
    control = patch_of(base, layer, lenses[layer], known, ranked[layer], other, chosen["edit"])
    found["random"] = {"neurons": other, **measure(base, config, val, by, control)}
    save_file({k: v.cpu().contiguous() for k, v in control.tensors.items()}, folder / CONTROL)
    found["questions"] = questions(base, config, cards, lenses)
    found["examples"] = examples(base, config, val, by, patch, folder)
    save_neurons(cards, folder)
    seal_labels(config, by, folder)
    write_evidence(folder, found)
    return artifact.save(patch, "second_order", folder, base=base.label)


CONTROL = "control.safetensors"
"""File with the control's tensors, so that test measures the same control as val"""


def candidates(config: Config, lenses: Mapping[int, NeuronLens]) -> Iterator[tuple[int, Edit, int]]:
    """Yield candidate edits as (layer, edit, number of neurons); each leaves as many others for a control."""
    rows = [
        (layer, edit, n)
        for layer, at in lenses.items()
        for edit in config.edits
        for n in affordable(config.counts, at.neurons)
    ]
    yield from tqdm(rows, "candidates", disable=None, leave=False)
