"""Real images that a config's `data` names: a folder in the task's own layout, `layout:folder`, or both with a comma.

    data=/folder                        the task's own layout (a folder per class; Waterbirds; CelebA)
    data=rta:/folder                    fitted on the lab's drawings, measured on photographed attacks
    data=imagenet:/folder,scam:/folder  fitted on the first, measured on the second

Photographed attacks have the split test alone, so nothing is fitted or chosen on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from registry.errors import ConfigError, nearest
from training.data import images
from training.data.images import Batch, Dataset

OWN = ("imagenet", "waterbirds", "celeba")
"""Layouts that are fitted on"""


def _rta(folder: str) -> dict[str, Dataset]:
    return {"attacked": images.rta(folder)}


def _scam(folder: str) -> dict[str, Dataset]:
    """Each attacked image with its twin without the word."""
    return {"clean": images.scam(folder, variant="NoSCAM"), "attacked": images.scam(folder, variant="SCAM")}


def _disentangling(folder: str) -> dict[str, Dataset]:
    whole = images.disentangling(folder)
    marked = torch.cat([b.extras["word_label"] for b in whole.batches()]) >= 0
    kinds = {"clean": ~marked, "attacked": marked}
    return {name: subset(whole, rows.nonzero()[:, 0], name) for name, rows in kinds.items() if bool(rows.any())}


PHOTOGRAPHED: dict[str, Callable[[str], dict[str, Dataset]]] = {
    "rta": _rta, "paint": _rta, "scam": _scam, "disentangling": _disentangling,
}  # fmt: skip
"""Layout of photographed typographic attacks -> `attacked`, and `clean` where there are images without a word"""


@dataclass(frozen=True)
class Named:
    """What a config's `data` names."""

    folder: str
    """Folder in the task's own layout; empty: the lab's drawings"""
    attacks: tuple[str, str] | None = None
    """Layout and folder of photographed attacks to measure on"""


def named(data: str) -> Named:
    """Read a config's `data`. Raises ConfigError listing the layouts for one that there is not, or for two alike."""
    if not data or Path(data).expanduser().is_dir():
        return Named(data)
    folder, attacks = "", None
    for part in data.split(","):
        layout, colon, path = part.partition(":")
        if not colon or "/" in layout:
            layout, path = "", part
        if layout in PHOTOGRAPHED and attacks is None:
            attacks = layout, path
        elif layout in ("", *OWN) and not folder:
            folder = path
        else:
            known = nearest(layout, [*OWN, *PHOTOGRAPHED])
            why = "is the second of its kind" if layout in known.split(", ") else "is no layout"
            raise ConfigError(f"data={data[:80]!r}: {layout[:30]!r} {why}. Layouts: {known}.")
    return Named(folder, attacks)


def photographs(attacks: tuple[str, str]) -> dict[str, Dataset]:
    """Open photographed attacks: `attacked`, and `clean` where there are images without a word."""
    layout, folder = attacks
    return PHOTOGRAPHED[layout](folder)


def subset(whole: Dataset, rows: Tensor, what: str) -> Dataset:
    """Return some images of a data set, in the order of `rows` (n,)."""

    def read(which: Tensor) -> Batch:
        return whole.read(rows[which])

    return Dataset(whole.name, whole.split, whole.classes, len(rows), {**whole.about, "part": what}, read)
