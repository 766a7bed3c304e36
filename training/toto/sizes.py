"""Toto's sizes: the paper's three, and small ones for the lab."""

from __future__ import annotations

from patches.families.video.untrained import TOTO
from patches.families.video.untrained import Decoder as Size

SIZES: dict[str, Size] = {
    "tiny": Size(16, 2, 2, 32),
    "w24": Size(24, 3, 2, 64),
    "w32": Size(32, 4, 2, 96),
    "w48": Size(48, 4, 3, 128),
    "lab": Size(64, 6, 4, 192),
    "w96": Size(96, 6, 6, 256),
    **TOTO,
}
__all__ = ["SIZES", "Size"]
