"""Feature cards: top-activating images, density and nearest words of each dictionary feature. Made by a fit, read here.

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
    """Cards of F features over n images; N images and K words are kept per feature."""

    density: Tensor
    """(F,) fraction of tokens on which a feature fires"""
    largest: Tensor
    """(F,) largest activation"""
    picture: Tensor
    """(F, N) indices of the top-activating images, best first; -1: none"""
    activation: Tensor
    """(F, N) largest activation on each of these images"""
    token: Tensor
    """(F, N) token of that activation: 0 the class token, then patches row by row"""
    word: Tensor
    """(F, K) indices of the words nearest to the feature's direction, on the direct path to the joint space; best
    first"""
    cosine: Tensor
    """(F, K) cosine with each of these words, less the mean over all words"""
    thumbs: Tensor
    """(n, 3, s, s) uint8 thumbnails of the images"""
    words: Sequence[str]
    """Vocabulary of the words"""

    def card(self, j: int) -> dict[str, Any]:
        """Return the card of feature j as plain values, images by index.

        Raises NotFound naming the range of features.
        """
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
    """Write the cards into `folder`, before the folder is sealed."""
    tensors = {k: v.contiguous() for k, v in vars(cards).items() if k != "words"}
    save_file(tensors, folder / TENSORS)
    (folder / WORDS).write_text(json.dumps(list(cards.words)))


def load_cards(folder: Path) -> Cards:
    """Load the cards of an artifact. Raises NotFound if it has none."""
    if not (folder / TENSORS).is_file():
        raise NotFound("This artifact carries no feature cards; fit it again with a recipe that makes them.")
    return Cards(**tensors(folder, TENSORS), words=json.loads(content(folder, WORDS)))


def best(largest: Tensor, where: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select top images per feature from maxima `largest` (n, F) at tokens `where` (n, F).

    Returns picture, activation and token, (F, N) each.
    """
    count = min(count, len(largest))
    top = largest.topk(count, 0)
    token = where.gather(0, top.indices)
    picture = torch.where(top.values > 0, top.indices, -1)
    return picture.T.int(), top.values.T, token.T.int()
