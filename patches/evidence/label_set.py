"""Label sets: linear classifiers of CLIP embeddings, from texts or from a fitted probe, which is sealed with its patch.

Zero-shot weights are recomputed from texts and need no file. A probe is fitted on images, so it is sealed with the
patch that was fitted for it. A class may have several columns, one for each of its kinds (species, say): their
probabilities add up. File of a sealed folder: label_set.safetensors, the labels in its header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from patches.evidence import content
from registry.errors import BadArtifact, NotFound

FILE = "label_set.safetensors"


@dataclass(frozen=True, eq=False)
class LabelSet:
    """Classifier of C classes with K columns; columns with the same label belong to one class."""

    labels: tuple[str, ...]
    """Label of each column"""
    weights: Tensor
    """(k, K) weights on unit embeddings"""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Distinct labels, in order of appearance."""
        return tuple(dict.fromkeys(self.labels))

    def logits(self, y: Tensor, scale: float = 1.0) -> Tensor:
        """Compute class logits (n, C) of embeddings (n, k); their softmax is the columns' summed by class."""
        z = scale * y @ self.weights
        if len(self.classes) == len(self.labels):
            return z
        return torch.stack([z[:, at].logsumexp(1) for at in self._columns], 1)

    @property
    def directions(self) -> Tensor:
        """(k, C) one direction per class: the mean of its columns."""
        return torch.stack([self.weights[:, at].mean(1) for at in self._columns], 1)

    @cached_property
    def _columns(self) -> list[list[int]]:
        return [[i for i, x in enumerate(self.labels) if x == name] for name in self.classes]


def save_label_set(one: LabelSet, folder: Path) -> None:
    """Write a label set into `folder`, before the folder is sealed."""
    save_file({"weights": one.weights.cpu().contiguous()}, folder / FILE, {"labels": json.dumps(list(one.labels))})


def load_label_set(folder: Path, digest: str | None = None) -> LabelSet:
    """Load a label set. Raises NotFound if the artifact has none, BadArtifact if labels and weights do not match."""
    if not (folder / FILE).is_file():
        raise NotFound("This artifact carries no label set: name the labels.")
    raw = content(folder, FILE, digest)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    labels, weights = json.loads(header.get("__metadata__", {}).get("labels", "[]")), load(raw)["weights"]
    if weights.ndim != 2 or weights.shape[1] != len(labels) or len(set(labels)) < 2:
        raise BadArtifact(f"{folder / FILE} has {len(labels)} labels for weights of shape {tuple(weights.shape)}.")
    return LabelSet(tuple(labels), weights)
