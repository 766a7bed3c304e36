"""Feature cards: what each feature of a dictionary fires on, and what it says. Read here, made by a fit.

Files of a sealed folder: cards.safetensors and cards.json (the words).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from patches.evidence import content, tensors
from registry.errors import NotFound

TENSORS, WORDS = "cards.safetensors", "cards.json"


@dataclass(frozen=True, eq=False)
class Cards:
    """F features, seen on n pictures; N pictures and K words are kept for each."""

    density: Tensor
    """(F,) share of tokens a feature fires on"""
    largest: Tensor
    """(F,) its largest activation"""
    picture: Tensor
    """(F, N) the pictures it fires most on, best first; -1: none"""
    activation: Tensor
    """(F, N) its largest activation there"""
    token: Tensor
    """(F, N) where: 0 the class token, then patches row by row"""
    word: Tensor
    """(F, K) the words its direction is nearest to, on the direct path to the joint space; best first"""
    cosine: Tensor
    """(F, K) above the mean over words"""
    thumbs: Tensor
    """(n, 3, s, s) uint8"""
    words: Sequence[str]

    def card(self, j: int) -> dict[str, Any]:
        """Feature j for people; pictures by their number. Raises NotFound naming what there is."""
        F = len(self.density)
        if not 0 <= j < F:
            raise NotFound(f"There is no feature {j}; this dictionary has 0 to {F - 1}.")
        seen = [
            {"picture": p, "activation": a, "token": t}
            for p, a, t in zip(*(x[j].tolist() for x in (self.picture, self.activation, self.token)), strict=True)
            if p >= 0
        ]
        words = [
            {"word": self.words[w], "cosine": c}
            for w, c in zip(self.word[j].tolist(), self.cosine[j].tolist(), strict=True)
        ]
        about = {"feature": j, "density": float(self.density[j]), "largest": float(self.largest[j])}
        return {**about, "words": words, "pictures": seen}


def save_cards(cards: Cards, folder: Path) -> None:
    tensors = {k: v.contiguous() for k, v in vars(cards).items() if k != "words"}
    save_file(tensors, folder / TENSORS)
    (folder / WORDS).write_text(json.dumps(list(cards.words)))


def load_cards(folder: Path) -> Cards:
    """Raises NotFound if the artifact carries none."""
    if not (folder / TENSORS).is_file():
        raise NotFound("This artifact carries no feature cards; fit it again with a recipe that makes them.")
    return Cards(**tensors(folder, TENSORS), words=json.loads(content(folder, WORDS)))


def best(largest: Tensor, where: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """picture, activation, token, each (F, N), of largest (n, F) activations at tokens where (n, F)."""
    count = min(count, len(largest))
    top = largest.topk(count, 0)
    token = where.gather(0, top.indices)
    picture = torch.where(top.values > 0, top.indices, -1)
    return picture.T.int(), top.values.T, token.T.int()
