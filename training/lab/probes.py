"""One zero-shot probe per planted property of `lab:clip`: the accuracies by which mean-ablating heads is measured.

| probe | images | answers |
|---|---|---|
| `background` | single objects | the nine backgrounds |
| `text` | a word written over another object | the words of the split |
| `colour` | hearts, circles, squares, books in their colours | the colours of that kind of object |
| `person` | portraits | man or woman, and their hair |
| `food` | single foods | the names of foods |

The text and colour probes use words and objects that the base was trained on. Heads are chosen from texts alone, so
nothing is fitted on these images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patches.families import clip
from patches.families.base import Base
from training.data.images import Batch, Dataset
from training.lab import atlas, worlds
from training.lab.pool import COLOURED, coloured
from training.lab.renderer import GROUNDS, Layout, generator, grounds, render, things

BATCH = 50


@dataclass(frozen=True, eq=False)
class Probe:
    """Zero-shot classification task: images, text embeddings of the answers, and the correct answer of each image."""

    image: Tensor
    """(n, 3, R, R) uint8"""
    answers: Tensor
    """(k, C) unit text embeddings of the C answers"""
    right: Tensor
    """(n,) index of the correct answer"""
    open: Tensor | None = None
    """(n, C) bool: answers among which an image is classified; None for all of them"""

    @torch.no_grad()
    def accuracy(self, base: Base) -> float:
        """Return the accuracy in [0, 1] of the base, including any patch that is applied to it."""
        logits = (clip.embed_images(base, self.image, BATCH) @ self.answers).cpu()
        if self.open is not None:
            logits = logits.masked_fill(~self.open, -torch.inf)
        return round(float((logits.argmax(1) == self.right).float().mean()), 4)


def background(base: Base, split: str, n: int, seed: int) -> Probe:
    """Build the probe "which background is shown?" from the `imagenet` world."""
    batch = _all(worlds.imagenet(_split(split), n, seed))
    return Probe(batch.image, clip.embed_texts(base, GROUNDS, ("a picture of {}", "on {}")).T, batch.extras["ground"])


def text(base: Base, split: str, n: int, seed: int) -> Probe:
    """Build the probe "which word is written?" from the `typographic` world, among all words of the split."""
    data = worlds.typographic(_split(split), n, seed)
    batch = _all(data)
    words = clip.embed_texts(base, data.classes, ("the word {}", "a sign that says {}"))
    return Probe(batch.image, words.T, batch.extras["word_label"])


def colour(base: Base, split: str, n: int, seed: int) -> Probe:
    """Build the probe "which colour does the object have?", among the colours that kind of object comes in."""
    lab, g = atlas.load(), generator("probe", "colour", split, n, seed)
    names = [x for x in lab.names if coloured(x) and x.split()[-1] in COLOURED]
    kinds = [x.split()[-1] for x in names]
    ids = [lab.find(x) for x in names]
    right = torch.randint(len(names), (n,), generator=g)
    styles = worlds.STYLES[split] if split != "held" else (atlas.HELD,)
    pools = [lab.pick([c], styles) for c in ids]
    if any(not len(p) for p in pools):
        styles = worlds.SEEN
        pools = [lab.pick([c], styles) for c in ids]
    sprite = torch.stack([p[torch.randint(len(p), (), generator=g)] for p in (pools[i] for i in right.tolist())])
    scene = render(Layout(grounds(n, g), things(sprite, g, tint=0.0)))
    answers = clip.embed_texts(base, names, ("a picture of a {}",)).T
    same = torch.tensor([[a == b for b in kinds] for a in kinds])
    return Probe(scene.image, answers, right, same[right])


def person(base: Base, split: str, n: int, seed: int) -> Probe:
    """Build the probe "who is shown?" from the `celeba` world, among all portrait concepts."""
    batch = _all(worlds.celeba(_split(split), n, seed))
    lab = atlas.load()
    shown = batch.extras["concept"]
    every = sorted(set(shown.tolist()))
    answers = clip.embed_texts(base, [lab.names[c] for c in every], ("a picture of a {}",)).T
    return Probe(batch.image, answers, torch.tensor([every.index(c) for c in shown.tolist()]))


def food(base: Base, split: str, n: int, seed: int) -> Probe:
    """Build the probe "which food is shown?", among all foods drawn in the styles of the split."""
    lab, g = atlas.load(), generator("probe", "food", split, n, seed)
    styles = worlds.STYLES[split]
    ids = [c for c, group in enumerate(lab.groups) if group == "food-drink" and len(lab.pick([c], styles))]
    right = torch.randint(len(ids), (n,), generator=g)
    pools = [lab.pick([c], styles) for c in ids]
    sprite = torch.stack([p[torch.randint(len(p), (), generator=g)] for p in (pools[i] for i in right.tolist())])
    scene = render(Layout(grounds(n, g), things(sprite, g)))
    return Probe(scene.image, clip.embed_texts(base, [lab.names[c] for c in ids], ("a picture of a {}",)).T, right)


PROBES: dict[str, Callable[[Base, str, int, int], Probe]] = {
    "background": background, "text": text, "colour": colour, "person": person, "food": food,
}  # fmt: skip


def _split(split: str) -> worlds.Split:
    """Check that a split exists; its type is then `worlds.Split`."""
    return next(s for s in worlds.SPLITS if s == split)


def _all(data: Dataset) -> Batch:
    return data.read(range(len(data)))
