"""A world without models: the score of a text is how near it comes to a hidden one, word by word."""

from __future__ import annotations

import torch

from patches.families.search.bank import bank
from patches.families.search.config import SearchConfig
from patches.families.search.generators import Mutation
from patches.families.search.loop import Item, Searcher
from patches.families.search.scorers import Scorer, Target
from registry.errors import Invalid

NOUNS = "cat dog sun ink sea hat cup owl bee fox jar key map nut pen".split()  # noqa: SIM905
GROUNDS = ("sand", "snow", "wood")
LINES = (
    *(f"a picture of a {n}" for n in NOUNS),
    *(f"a picture of a {a} and a {b}" for a, b in zip(NOUNS, NOUNS[3:], strict=False)),
    *(f"a picture of a {n} on {g}" for n in NOUNS[:4] for g in GROUNDS),
    *(f"a picture of a hat and a cup on {g}" for g in GROUNDS),
)
BANK = bank(LINES)


class Hidden(Scorer):
    """1 minus the share of words that differ from a hidden text; every word of either counts."""

    def __init__(self):
        super().__init__()
        self.log = []

    def target(self, inputs):
        if "hidden" not in inputs:
            raise Invalid(f"This scorer wants a hidden text; it was given {', '.join(inputs) or 'nothing'}.")
        return Target(torch.tensor([float(w in inputs["hidden"].split()) for w in WORDS]))

    def encode(self, texts, target):
        self.log += texts
        return torch.tensor([[float(w in t.split()) for w in WORDS] for t in texts])

    def compare(self, features, target):
        want = target.vector.double()
        hit = features @ want
        return 2 * hit / (features.sum(1) + want.sum()).clamp_min(1e-9)


WORDS = sorted({w for line in LINES for w in line.split()})
HIDDEN = (
    "a picture of a cat and a fox on snow",
    "a picture of a pen and a sea on wood",
    "a picture of a bee and a key",
)


def config(**how):
    return SearchConfig(**{"keep": 8, "ask": 12, "steps": 12, **how})


def searcher(scorer=None, generator=None, **how):
    return Searcher(config(**how), BANK, scorer or Hidden(), generator or Mutation(BANK))


def items(s, hidden=HIDDEN, **more):
    return [Item(inputs={"hidden": h}, config=s.config, key=str(i), **more) for i, h in enumerate(hidden)]
