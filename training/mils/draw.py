"""What draws for the tasks that make pictures: the lab's renderer as a program that draws the names a text says.

A stand-in for a diffusion base that is as quick as the search around it: it knows the 100 classes and the nine grounds
by their names, draws the first two things a text says, at fixed places, in one style, and nothing it does not know. As
an editor it keeps the things of a scene and changes the ground. `patches.families.search.draw` has the diffusion base,
which `mils/prompt` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patches.families.search.scorers import Renderer
from training.lab import atlas, worlds
from training.lab.renderer import GROUNDS, Grounds, Layout, Things, choose, generator, grounds, render, things
from training.tasks.captions import named, words

PLAIN = GROUNDS.index("plain paper")


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


class Grounder(Renderer):
    """An editor that puts the ground a text names behind a scene: pixels near the scene's border colours are replaced.

    A text that names no ground leaves the picture as it is."""

    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        assert picture is not None
        g = generator("mils/grounder", 0)
        one = grounds(1, g, textures=(0, 1))
        nothing = things(torch.full((1, 1), -1), g)
        edge = torch.cat([picture[:, :4].flatten(1), picture[:, -4:].flatten(1)], 1).float()
        centre, spread = edge.mean(1)[:, None, None], edge.std(1).clamp_min(12)[:, None, None]
        behind = ((picture.float() - centre).abs() < 2.5 * spread).all(0)
        out = []
        for text in texts:
            where = sorted(named(text, GROUNDS), key=" ".join(words(text)).find)
            if not where:
                out.append(picture)
                continue
            kind = torch.tensor([GROUNDS.index(where[0])])
            made = render(Layout(replace(one, kind=kind), nothing)).image[0]
            out.append(torch.where(behind, made, picture))
        return torch.stack(out)
