"""What draws for the tasks that make pictures: the lab's renderer as a program that draws the names a text says.

A stand-in for a diffusion base that is as quick as the search around it: it knows the 100 classes and the nine grounds
by their names, draws the first two things a text says, at fixed places, in one style, and nothing it does not know.
`patches.families.search.draw` has the diffusion base, which `mils/prompt` names. The editor of `mils/style` is made
here too: the nine grounds as backdrops, which the fit seals, and eight lights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patches.families.search.backdrops import Backdrops
from patches.families.search.scorers import Renderer
from training.lab import atlas, worlds
from training.lab.renderer import GROUNDS, Grounds, Layout, Things, choose, generator, grounds, render, things
from training.tasks.captions import named, words

PLAIN = GROUNDS.index("plain paper")
LIGHTS = {
    "dim light": (0.55, 0.55, 0.55), "warm light": (1.2, 0.95, 0.65), "cold light": (0.7, 0.95, 1.25),
    "red light": (1.3, 0.55, 0.55), "green light": (0.55, 1.2, 0.55), "blue light": (0.5, 0.6, 1.4),
    "purple light": (1.1, 0.5, 1.2), "bright light": (1.45, 1.45, 1.45),
}  # fmt: skip
"""name -> gains of red, green and blue"""


class Drawer(Renderer):
    """Text to picture."""

    def __init__(self, seed: int = 0, know: int = 100) -> None:
        """know: how many of the classes it can draw."""
        self.seed, self.classes = seed, worlds.imagenet_classes()[:know]

    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        lab, n = atlas.load(), len(texts)
        g = generator("mils/draw", self.seed)
        stuff = things(torch.zeros(1, 2, dtype=torch.int64), g, size=(0.45, 0.5))
        ground = grounds(1, g, textures=(0, 1))
        sprite, kind = torch.full((n, 2), -1), torch.full((n,), PLAIN)
        for row, text in enumerate(texts):
            spoken = " ".join(words(text))
            said = sorted(named(text, self.classes), key=spoken.find)
            for k, name in enumerate(said[:2]):
                sprite[row, k] = choose(lab.pick([lab.find(name)], worlds.STYLES["train"][:1]), (1,), g)[0]
            where = sorted(named(text, GROUNDS), key=spoken.find)
            kind[row] = GROUNDS.index(where[0]) if where else PLAIN
        spread = {k: v.expand(n, *v.shape[1:]).clone() for k, v in vars(stuff).items()}
        on = {k: v.expand(n, *v.shape[1:]).clone() for k, v in vars(ground).items()}
        return render(Layout(Grounds(**{**on, "kind": kind}), Things(**{**spread, "sprite": sprite}))).image


def editor() -> Backdrops:
    """The grounds as backdrops, of textures that scenes of val and test do not have, and the lights."""
    g = generator("mils/grounder", 0)
    one = grounds(1, g, textures=(0, 1))
    nothing = things(torch.full((1, 1), -1), g)
    made = {name: render(Layout(replace(one, kind=torch.tensor([k])), nothing)).image[0]
            for k, name in enumerate(GROUNDS)}  # fmt: skip
    return Backdrops(made, {name: torch.tensor(gains) for name, gains in LIGHTS.items()})
