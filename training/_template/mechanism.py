"""Projecting a direction out of a layer's output. In a real system this file is patches/mechanisms/<name>.py.

x <- x - strength * (x . d) d          x (rows, T, D), d (D,) of unit norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from patches.engine.edits import Act, Edit, Inputs
from patches.engine.patch import Patch


@dataclass(frozen=True)
class DirectionConfig:
    """Where."""

    site: str
    """module path of the layer"""


@dataclass(frozen=True)
class WithoutDirection(Patch):
    """tensors: direction (D,), of unit norm."""

    Config = DirectionConfig
    config: DirectionConfig

    def edits(self) -> Sequence[Edit]:
        def without(x: Tensor, inputs: Inputs) -> Tensor:
            d = self.tensors["direction"].to(x)
            return x - (x @ d)[..., None] * d

        return [Act(self.config.site, without)]
