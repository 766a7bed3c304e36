"""A label set: what tells pictures apart by their embeddings, words or a probe. A probe travels with its patch.

Zero-shot labels need no file, their weights are texts. A probe is fitted on pictures, so it is sealed with the patch
that was fitted for it. A class may have several columns, one for each kind of thing it is: their probabilities add up.
File of a sealed folder: label_set.safetensors, the labels in its header.
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
    """C classes by K columns; columns of the same label are one class."""

    labels: tuple[str, ...]
    """Label of each column"""
    weights: Tensor
    """(k, K) on unit embeddings"""

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The different labels, in order."""
        return tuple(dict.fromkeys(self.labels))

    def logits(self, y: Tensor, scale: float = 1.0) -> Tensor:
        """(n, C) of embeddings (n, k). Their softmax is what the softmax over columns adds up to."""
        z = scale * y @ self.weights
        if len(self.classes) == len(self.labels):
            return z
        return torch.stack([z[:, at].logsumexp(1) for at in self._columns], 1)

    @property
    def directions(self) -> Tensor:
        """(k, C): a class as one direction, the mean of its columns."""
        return torch.stack([self.weights[:, at].mean(1) for at in self._columns], 1)

    @cached_property
    def _columns(self) -> list[list[int]]:
        return [[i for i, x in enumerate(self.labels) if x == name] for name in self.classes]


def save_label_set(one: LabelSet, folder: Path) -> None:
    save_file({"weights": one.weights.cpu().contiguous()}, folder / FILE, {"labels": json.dumps(list(one.labels))})


def load_label_set(folder: Path, digest: str | None = None) -> LabelSet:
    """Raises NotFound if the artifact carries none, BadArtifact if labels and weights do not belong together."""
    if not (folder / FILE).is_file():
        raise NotFound("This artifact carries no label set: name the labels.")
    raw = content(folder, FILE, digest)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    labels, weights = json.loads(header.get("__metadata__", {}).get("labels", "[]")), load(raw)["weights"]
    if weights.ndim != 2 or weights.shape[1] != len(labels) or len(set(labels)) < 2:
        raise BadArtifact(f"{folder / FILE} has {len(labels)} labels for weights of shape {tuple(weights.shape)}.")
    return LabelSet(tuple(labels), weights)
