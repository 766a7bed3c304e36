"""Toto's sizes: the paper's three, and small ones for the lab. FFN widths are those whose parameter counts fit the
published 120M, 280M and 1.1B (the paper prints none)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A decoder's sizes."""

    width: int
    depth: int
    heads: int
    hidden: int
    tied: bool = False

    @property
    def body(self) -> int:
        """Weights of the blocks and norms, embeddings left out."""
        return self.depth * (4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width) + self.width


SIZES: dict[str, Size] = {
    "tiny": Size(16, 2, 2, 32),
    "w24": Size(24, 3, 2, 64),
    "w32": Size(32, 4, 2, 96),
    "w48": Size(48, 4, 3, 128),
    "lab": Size(64, 6, 4, 192),
    "w96": Size(96, 6, 6, 256),
    "base": Size(768, 12, 12, 3072, True),
    "large": Size(1024, 16, 16, 4096, True),
    "1b": Size(2048, 22, 16, 5632),
}
