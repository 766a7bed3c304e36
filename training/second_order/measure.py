"""Measure a second_order edit by the task's metrics."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

from patches.evidence.label_set import LabelSet
from patches.families.base import Base
from patches.mechanisms.neurons import NeuronEdit
from training.data.images import Dataset
from training.second_order.config import Config
from training.tasks.recognition import (
    Answers,
    ask,
    metrics,
)


def measure(
    base: Base, config: Config, data: Mapping[str, Dataset], by: LabelSet, patch: NeuronEdit | None
) -> dict[str, float]:
    """Compute the task's metrics with the patch applied to the base, as it would be served."""
    with patch.apply(base.model, root=base.root) if patch else nullcontext():
        said: dict[str, Answers] = {k: ask(base, config, d, by) for k, d in data.items()}
    return metrics(config, said)
