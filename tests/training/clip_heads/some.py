"""What tests of clip_heads share: texts, a taxonomy, pictures of squares."""

from __future__ import annotations

import torch

from training.clip_heads import RECIPES

TINY = RECIPES["tiny"]
WORDS = (
    "red",
    "a red square",
    "green",
    "blue",
    "a cat",
    "a dog",
    "the sea",
    "a house",
    "a tree",
    "a car",
    "bread",
    "rain",
)
TAXONOMY = {"colour": ("red", "green", "blue"), "animal": ("cat", "dog"), "thing": ("house", "tree", "car", "bread")}
PLANTED = (2, 1)


def squares(n=64, seed=0):
    """Pictures (n, 3, 32, 32) of a square of patches on another colour, and where the red ones are red (n, 32, 32)."""
    g = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [0.5, 0.5, 0.4]])
    x, masks = torch.empty(n, 3, 32, 32), torch.zeros(n, 32, 32, dtype=torch.bool)
    for i in range(n):
        ground = colours[1 + int(torch.randint(3, (), generator=g))]
        square = colours[0] if i % 2 == 0 else colours[1 + int(torch.randint(3, (), generator=g))]
        x[i] = ground[:, None, None]
        size = 8 * int(torch.randint(2, 4, (), generator=g))
        top, left = (8 * int(torch.randint(0, 5 - size // 8, (), generator=g)) for _ in range(2))
        x[i, :, top : top + size, left : left + size] = square[:, None, None]
        if i % 2 == 0:
            masks[i, top : top + size, left : left + size] = True
    return x, masks
