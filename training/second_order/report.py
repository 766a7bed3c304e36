"""The full report: the sealed patch and its control on test, masks, pictures that mislead."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from patches import artifact
from patches.evidence.neuron_cards import Reader, load_neurons
from patches.families.base import load_base
from patches.mechanisms.neurons import NeuronEdit
from registry import config as configs
from training.second_order.config import Config
from training.second_order.fit import CONTROL
from training.second_order.misleading import attack
from training.tasks import segmentation
from training.tasks.intervals import wilson
from training.tasks.recognition import (
    ask,
    classifier,
    outcomes,
    pictures,
)


def report(folder: Path, out: Path) -> dict[str, Any]:
    """A sealed patch and its control on test, the masks of its neurons beside other ways, and pictures composed to
    mislead. Writes JSON as it goes."""
    sealed = json.loads((folder / "recipe.json").read_text())
    config = configs.parse(Config, sealed["config"])
    base = load_base(config.base, "clip", config.device)
    base.model.requires_grad_(False)
    about, patch = artifact.load(folder, base=base.digest, device=base.device)
    assert isinstance(patch, NeuronEdit)
    fitted = json.loads((folder / "report.json").read_text())
    c = replace(patch.config, neurons=tuple(fitted["random"]["neurons"]))
    control = NeuronEdit(c, load_file(folder / CONTROL)).to(base.device)
    arms = {"base": None, "second_order": patch, "random neurons": control}
    results: dict[str, Any] = {"digest": about.digest, "recipe": sealed["recipe"], "arms": {}}
    for name, arm in arms.items():
        row = results["arms"].setdefault(name, {})
        for split in ("test", *(["held"] if not config.data else [])):
            sets = pictures(config, split, config.test_images)
            with arm.apply(base.model, root=base.root) if arm else nullcontext():
                by = classifier(base, config, sets["clean"], folder=folder)
                said = {k: ask(base, config, d, by) for k, d in sets.items()}
            row[split] = {k: wilson(v) for k, v in outcomes(config, said).items()}
        out.write_text(json.dumps(results, indent=1))
    reader = Reader.of(base, load_neurons(folder))
    if not config.data:
        results["masks"] = segmentation.lab(base, "test", config.test_images, config.seed, reader)
        out.write_text(json.dumps(results, indent=1))
        results["misleading"] = attack(reader, seed=config.seed)
        out.write_text(json.dumps(results, indent=1))
    return results
