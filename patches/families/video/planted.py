"""Small video models made for a purpose: `tiny:toto`; `tiny:motions`, `tiny:toto-motions` with the lab's classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import torch

from patches.families.base import Base
from patches.families.video.base import _lively, digest_of, tiny
from patches.families.video.probe import Probe

MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink", "spin left", "spin right", "swing", "bounce")
"""the classes of the lab's actions, which the tiny recipes are measured on"""


def motions(kind: Literal["videomae", "toto"] = "videomae") -> Base:
    """The tiny model with a probe of the eleven motions."""
    base = tiny(0, kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base.model.probe = _lively(Probe(16, len(MOTIONS))).eval()
    base.model.classes = MOTIONS
    name = "tiny-motions" if kind == "videomae" else "tiny-toto-motions"
    ref = "tiny:motions" if kind == "videomae" else "tiny:toto-motions"
    return replace(base, ref=ref, name=name, digest=digest_of(base.model))


PURPOSES: Mapping[str, Callable[[], Base]] = {
    "toto": lambda: tiny(0, "toto"),
    "motions": motions,
    "toto-motions": lambda: motions("toto"),
}
