"""What tests of second_order share: words, and pictures with a red block."""

from __future__ import annotations

import torch

from training.second_order import RECIPES

TINY = RECIPES["tiny"]
LAYER, NEURON, LAST = 0, 5, 1
WORDS = ("red", "cat", "dog", "sun", "ink", "sea", "fox", "owl")
RED, OTHERS = (230, 20, 20), ((20, 200, 40), (30, 60, 220), (240, 240, 240))


def colours(n=24, seed=0):
    """(n, 3, 32, 32) uint8: 4 x 4 patches of other colours with a red block on 2 x 2 of them; (n, 32, 32) bool."""
    g = torch.Generator().manual_seed(seed)
    other = torch.tensor(OTHERS)[torch.randint(3, (n, 4, 4), generator=g)]
    mask = torch.zeros(n, 4, 4, dtype=torch.bool)
    for i in range(n):
        r, c = torch.randint(3, (2,), generator=g).tolist()
        mask[i, r : r + 2, c : c + 2] = True
    image = torch.where(mask[..., None], torch.tensor(RED), other).permute(0, 3, 1, 2)
    big = image.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return big.to(torch.uint8), mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
