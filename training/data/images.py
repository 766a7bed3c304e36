"""Pictures with labels: one shape for what is drawn (training/lab/worlds.py) and for the real data sets read here.

A `Dataset` is a value: name, split, classes, size, what chose its pictures (and so a digest for MLflow), and `read`.

    for batch in imagenet("/data/imagenet", "val"):         # batch.image (B, 3, 224, 224) uint8, batch.label (B,)
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from registry import manifest
from registry.errors import NotFound

BATCH = 64


@dataclass(frozen=True)
class Batch:
    """B pictures."""

    image: Tensor
    """(B, 3, H, W) uint8; clips are (B, T, 3, H, W)"""
    label: Tensor
    """(B,) int64 index of the data set's classes"""
    extras: Mapping[str, Any]
    """name -> (B, ...) tensor or B strings: what else is known of each picture"""

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Dataset:
    """Pictures that can be read in any order, and what they are."""

    name: str
    """`lab:typographic`, `waterbirds`; lab numbers are known by it"""
    split: str
    classes: tuple[str, ...]
    size: int
    about: Mapping[str, Any]
    """everything that chose the pictures, as plain values"""
    reader: Callable[[Tensor], Batch] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return self.size

    def read(self, rows: Sequence[int] | Tensor) -> Batch:
        """The pictures of these numbers, in this order. Raises NotFound beyond the last one."""
        rows = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows), dtype=torch.int64)
        if len(rows) == 0 or int(rows.min()) < 0 or int(rows.max()) >= self.size:
            raise NotFound(f"{self.name}/{self.split} has pictures 0 to {self.size - 1}; ask for at least one of them.")
        return self.reader(rows)

    def batches(self, size: int = BATCH) -> Iterator[Batch]:
        """All pictures in order, the last batch as long as it is."""
        for i in range(0, self.size, size):
            yield self.read(range(i, min(i + size, self.size)))

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    @property
    def digest(self) -> str:
        """64 hex digits: the same data set, the same digest, on every machine."""
        about = {"name": self.name, "split": self.split, "classes": list(self.classes), "size": self.size}
        return manifest.digest_of({**about, "about": dict(self.about)})
