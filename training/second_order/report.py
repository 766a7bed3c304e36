"""Full report of second_order: the sealed patch and its control on test, segmentation, misleading images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from patches.evidence.neuron_cards import Reader, load_neurons
from patches.mechanisms.neurons import NeuronEdit
from training.evidence import Draft, open_patch
from training.second_order.config import Config
from training.second_order.fit import CONTROL
from training.second_order.misleading import attack
from training.tasks import segmentation
from training.tasks.recognition import Arm, report_arms


def report(folder: Path, config: Config) -> dict[str, Any]:
    """Measure a sealed patch and its control on test, segmentation by its neurons, and misleading composed images."""
    opened = open_patch(folder, config.base, config.device)
    base, patch, fitted = opened.base, opened.patch, opened.fitted
    assert isinstance(patch, NeuronEdit)
    c = replace(patch.config, neurons=tuple(fitted["random"]["neurons"]))
    control = NeuronEdit(c, load_file(folder / CONTROL)).to(base.device)
    arms = {"base": Arm(), "second_order": Arm(patch, about=fitted["chosen"]), "random neurons": Arm(control)}
    draft = Draft(opened.about)
    report_arms(base, config, arms.items(), folder, draft)
    reader = Reader.of(base, load_neurons(folder))
    if not config.data:
        draft.keep("masks", value=segmentation.lab(base, "test", config.test_images, config.seed, reader))
        draft.keep("misleading", value=attack(reader, seed=config.seed))
    return draft
