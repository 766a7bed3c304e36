"""A label set: classes by name and a linear classifier of them, sealed with a patch that was fitted for it.

Zero-shot labels need no file, their weights are texts. A probe is fitted on pictures, so it travels with the artifact.
File of a sealed folder: label_set.safetensors, the names in its header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from registry.errors import BadArtifact, NotFound

FILE = "label_set.safetensors"


@dataclass(frozen=True, eq=False)
class LabelSet:
    """C classes of unit embeddings."""

    labels: tuple[str, ...]
    weights: Tensor
    """(k, C); logits are logit_scale(base) * features @ weights"""


def save_label_set(one: LabelSet, folder: Path) -> None:
    save_file({"weights": one.weights.cpu().contiguous()}, folder / FILE, {"labels": json.dumps(list(one.labels))})


def load_label_set(folder: Path) -> LabelSet:
    """Raises NotFound if the artifact carries none, BadArtifact if names and weights do not belong together."""
    if not (folder / FILE).is_file():
        raise NotFound("This artifact carries no label set: name the labels.")
    with safe_open(folder / FILE, "pt") as f:
        labels, weights = json.loads((f.metadata() or {}).get("labels", "[]")), f.get_tensor("weights")
    if weights.ndim != 2 or weights.shape[1] != len(labels) or len(set(labels)) != len(labels):
        raise BadArtifact(f"{folder / FILE} has {len(labels)} names for weights of shape {tuple(weights.shape)}.")
    return LabelSet(tuple(labels), weights)
