"""Fitting: neurons read and ranked on train, the edit chosen on val, the sealed folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tqdm import tqdm

from patches import artifact
from patches.evidence.label_set import LabelSet
from patches.evidence.neuron_cards import save_neurons
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip.second_order import (
    NeuronLens,
)
from patches.mechanisms.neurons import NeuronEdit
from registry.manifest import Manifest, canonical
from training.data.images import Dataset
from training.second_order.config import Config, Edit
from training.second_order.find import alike, of_task, patch_of, rank, read, texts_of
from training.second_order.measure import measure
from training.second_order.questions import questions
from training.tasks.recognition import (
    affordable,
    classifier,
    pictures,
    seal_labels,
    worth,
)


def fit(config: Config, folder: Path) -> Manifest:
    """Read the neurons, rank them on train, choose on val, seal the edit with the cards and the evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    train = of_task(config, "train", config.rank_images)
    val = pictures(config, "val", config.val_images)
    by = classifier(base, config, val["clean"])
    cards, lenses = read(base, config, texts_of(config, train["clean"]))
    found = rank(base, config, lenses, train)
    report: dict[str, Any] = {"task": config.task, "candidates": [], "base": measure(base, config, val, by, None)}
    best: tuple[float, NeuronEdit, dict[str, Any]] | None = None
    for layer, edit, count in candidates(config, lenses):
        js = found[layer].order[:count].tolist()
        patch = patch_of(base, layer, lenses[layer], cards.layers[layer].known, found[layer], js, edit)
        got = measure(base, config, val, by, patch)
        row: dict[str, Any] = {
            "layer": layer,
            "edit": edit,
            "count": count,
            **got,
            "worth": worth(config, got, report["base"]),
        }
        report["candidates"].append(row)
        if best is None or row["worth"] > best[0]:
            best = row["worth"], patch, row
    assert best is not None
    _, patch, chosen = best
    layer, known = chosen["layer"], cards.layers[chosen["layer"]].known
    report["chosen"] = chosen
    other = alike(known, patch.config.neurons, config.seed)
    control = patch_of(base, layer, lenses[layer], known, found[layer], other, chosen["edit"])
    report["random"] = {"neurons": other, **measure(base, config, val, by, control)}
    save_file({k: v.cpu().contiguous() for k, v in control.tensors.items()}, folder / CONTROL)
    report["questions"] = questions(base, config, cards, lenses)
    _examples(base, config, val, by, patch, report, folder)
    save_neurons(cards, folder)
    seal_labels(config, by, folder)
    (folder / "report.json").write_bytes(canonical(json.loads(json.dumps(report))))
    return artifact.save(patch, "second_order", folder, base=base.label)


CONTROL = "control.safetensors"
"""the control's tensors, so that it can be measured on test as it was on val"""


def candidates(config: Config, lenses: Mapping[int, NeuronLens]) -> Iterator[tuple[int, Edit, int]]:
    """(layer, edit, number of neurons); a control takes as many others."""
    rows = [
        (layer, edit, n)
        for layer, at in lenses.items()
        for edit in config.edits
        for n in affordable(config.counts, at.neurons)
    ]
    yield from tqdm(rows, "candidates", disable=None, leave=False)


def _examples(
    base: Base, config: Config, data: Mapping[str, Dataset], by: LabelSet, patch: NeuronEdit,
    report: dict[str, Any], folder: Path, count: int = 8,
) -> None:  # fmt: skip
    """A few pictures of val with what the base and the patched model call them."""
    shown = data["attacked" if config.task == "typographic" else "clean"]
    batch = shown.read(range(min(count, len(shown))))
    said = {}
    for side, on in (("base", None), ("patched", patch)):
        with on.apply(base.model, root=base.root) if on else nullcontext():
            best = by.logits(clip.embed_images(base, batch.image)).argmax(1)
            said[side] = [shown.classes[i] for i in best.tolist()]
    report["examples"] = {**said, "is": [shown.classes[i] for i in batch.label.tolist()]}
    save_file({"image": batch.image.cpu().contiguous()}, folder / "examples.safetensors")
