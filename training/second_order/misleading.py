"""Composed images that mislead CLIP: words mined from neurons are drawn beside an object, out of lab sprites.

Gandelsman, Efros, Steinhardt, arXiv 2406.04341, section 5.1: neurons are polysemous, so unrelated words may be evidence
for a class. For a pair (true, wrong), words are mined (`neuron_cards.mine`) and images of the true class that show them
are made; an image is a success if CLIP prefers the wrong class. The paper generates images from text; here they are
composed of sprites (or the background, if the word is one), so their content is known and the filter is a rule instead
of a person. Controls, each with as many words and images:

- `random neurons`: as many random neurons, same mining;
- `indirect`: the neurons with the largest first-order effect on the answer, gradient x (activation - mean), same
  mining; the paper takes such neurons' own indirect effects for directions, which needs a forward per neuron;
- `similar words`: the pool's texts nearest to the wrong class; no neurons;
- `random words` and `nothing`: floors.

Rates before the filter are over all images, made from words not filtered for synonyms; rates after it are over the
images among them that pass (`passes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.evidence.neuron_cards import MINE_NEURONS, SYNONYM, NeuronCards, Reader, mine
from patches.families import clip
from patches.families.base import Base
from training.data.images import Dataset
from training.lab import atlas, worlds
from training.lab.renderer import BRICK, GROUNDS, Layout, Scene, generator, grounds, render, things
from training.progress import tqdm

WAYS = ("second order", "random neurons", "indirect", "similar words", "random words", "nothing")
VISIBLE = 0.6
"""Fraction of the true object that must be visible"""


@dataclass(frozen=True)
class Drawable:
    """Texts of a pool that the lab can draw, as a sprite or as a background."""

    concept: dict[str, int]
    """Text -> index of its concept in the atlas"""
    ground: dict[str, int]
    """Text -> index of its background in GROUNDS"""

    @classmethod
    def of(cls, texts: Sequence[str], styles: Sequence[str]) -> Drawable:
        """Match the pool's texts with the sprites of these styles and with the backgrounds."""
        lab = atlas.load()
        columns = [lab.styles.index(s) for s in styles]
        there = (lab.table[:, columns] >= 0).any(1).tolist()
        names = {n: i for i, n in enumerate(lab.names) if there[i]}
        return cls({t: names[t] for t in texts if t in names}, {t: GROUNDS.index(t) for t in texts if t in GROUNDS})

    def __contains__(self, text: str) -> bool:
        return text in self.concept or text in self.ground


def words_for(
    reader: Reader, way: str, true: str, wrong: str, can: Drawable, count: int, seed: int, images: Tensor | None = None,
    neurons: int = MINE_NEURONS,
) -> list[str]:  # fmt: skip
    """Find at most `count` words by a method, without the names of the two classes.

    Synonyms of the wrong class are not filtered here. images: (B, 3, h, w) for `indirect`.
    """
    cards, base = reader.cards, reader.base
    t, w = clip.embed_texts(base, [true, wrong], clip.TEMPLATES)
    neurons = min(neurons, sum(len(one.told) for one in cards.layers.values()))
    names = {true, wrong}
    if way == "similar words":
        middle = cards.pool.mean(0)
        near = nnf.normalize(cards.pool - middle, dim=1) @ nnf.normalize(w - middle, dim=0)
        found = [cards.texts[j] for j in near.argsort(descending=True, stable=True).tolist()]
    elif way == "random words":
        order = torch.randperm(len(cards.texts), generator=generator("words", true, wrong, seed))
        found = [cards.texts[j] for j in order.tolist()]
    else:
        chosen = None
        if way == "random neurons":
            chosen = drawn(cards, neurons, generator("neurons", true, wrong, seed))
        elif way == "indirect":
            assert images is not None
            chosen = indirect(reader, images, t, w, neurons)
        mined, _ = mine(cards, t, w, neurons, len(cards.texts), (), 2.0, 0, chosen)
        found = [m.text for m in mined]
    return [x for x in found if x in can and x not in names][:count]


def drawn(cards: NeuronCards, count: int, g: torch.Generator) -> list[tuple[int, Tensor]]:
    """Draw `count` random neurons, as (layer, neurons)."""
    places = [(number, n) for number, one in cards.layers.items() for n in range(len(one.told))]
    picked = [places[i] for i in torch.randperm(len(places), generator=g)[:count].tolist()]
    return [
        (number, torch.tensor([n for at, n in picked if at == number], dtype=torch.long)) for number in cards.layers
    ]


def indirect(reader: Reader, images: Tensor, true: Tensor, wrong: Tensor, count: int) -> list[tuple[int, Tensor]]:
    """Return the neurons with the largest first-order effect on <y, wrong - true> / |y|, as (layer, neurons).

    The effect is that of mean-ablation, by its mean absolute value over images.
    """
    base, layers = reader.base, list(reader.cards.layers)
    blocks = base.model.visual.transformer.resblocks
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept[layer] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (kept[layer], *args[1:])

        return hook

    handles = [blocks[layer].mlp.c_proj.register_forward_pre_hook(keep(layer)) for layer in layers]
    scores = dict.fromkeys(layers, torch.zeros(()))
    try:
        for part in torch.split(base.processor.image(images), 16):
            with torch.enable_grad():
                y = base.model(image=part.to(base.device))["image_features"] @ (wrong - true)
                slopes = torch.autograd.grad(y.sum(), [kept[layer] for layer in layers])
            for layer, slope in zip(layers, slopes, strict=True):
                away = kept[layer].detach() - reader.cards.layers[layer].rest
                scores[layer] = scores[layer] + (slope * away).sum(1).abs().sum(0)
    finally:
        for handle in handles:
            handle.remove()
    whole = torch.cat([scores[layer] for layer in layers])
    chosen = torch.zeros(len(whole), dtype=torch.bool)
    chosen[whole.topk(count).indices.cpu()] = True
    sizes = [len(scores[layer]) for layer in layers]
    return [(layer, c.nonzero()[:, 0]) for layer, c in zip(layers, torch.split(chosen, sizes), strict=True)]


def compose(
    true: str, words: Sequence[str], can: Drawable, n: int, styles: Sequence[str], g: torch.Generator
) -> tuple[Scene, Scene, list[list[str]]]:
    """Render n images of the true class with two of the words each, and the same images without the words.

    Returns both scenes and the words on each.
    """
    lab = atlas.load()

    def sprite(concept: int) -> int:
        pool = lab.pick([concept], styles)
        return int(pool[torch.randint(len(pool), (1,), generator=g)])

    thing = torch.tensor([[sprite(lab.find(true)), -1, -1] for _ in range(n)])
    with_words = thing.clone()
    ground = grounds(n, g)
    kind, shown = ground.kind.clone(), []
    for i in range(n):
        few = [words[j] for j in torch.randperm(len(words), generator=g)[:2].tolist()]
        for place, word in enumerate(few, 1):
            if word in can.ground:
                kind[i] = can.ground[word]
            else:
                with_words[i, place] = sprite(can.concept[word])
        shown.append(few)
    stuff = things(with_words, g)
    # backgrounds differ in the crops they allow (brick walls: whole bricks), so keep a corner that fits every kind
    corner = ground.corner // BRICK * BRICK
    with_scene = render(Layout(replace(ground, kind=kind, corner=corner), stuff))
    alone = render(Layout(replace(ground, corner=corner), replace(stuff, sprite=thing)))
    return with_scene, alone, shown


def passes(scene: Scene, alone: Scene, shown: Sequence[Sequence[str]], wrong: str, near: set[str]) -> Tensor:
    """Filter images (n,): the true object is visible, and nothing shown names the wrong class.

    Names count by a common word or as a synonym (`near`).
    """
    seen = scene.mask[:, 0].sum((1, 2)) / alone.mask[:, 0].sum((1, 2)).clamp_min(1)
    name = set(wrong.split())
    clean = torch.tensor([not any(set(w.split()) & name or w in near for w in few) for few in shown])
    return (seen >= VISIBLE) & clean


def synonyms(cards: NeuronCards, text: Tensor, at: float = SYNONYM) -> set[str]:
    """Return the pool's texts whose cosine with `text` (k,), both centred on the pool's mean, is at least `at`."""
    middle = cards.pool.mean(0)
    near = nnf.normalize(cards.pool - middle, dim=1) @ nnf.normalize(text - middle, dim=0) >= at
    return {cards.texts[j] for j in near.nonzero()[:, 0].tolist()}


def class_pairs(data: Dataset, count: int, seed: int) -> list[tuple[str, str]]:
    """Draw pairs of classes by the seed; no class twice."""
    order = torch.randperm(len(data.classes), generator=generator("pairs", seed)).tolist()
    return [(data.classes[order[2 * i]], data.classes[order[2 * i + 1]]) for i in range(count)]


@torch.no_grad()
def prefers(base: Base, images: Tensor, true: str, wrong: str) -> Tensor:
    """Return whether the wrong class gets the larger logit, (n,) bool."""
    weights = clip.zero_shot(base, [true, wrong])
    return (clip.embed_images(base, images) @ weights).argmax(1).cpu() == 1


def attack(
    reader: Reader, pairs: int = 8, n: int = 40, words: int = 8, seed: int = 0, split: str = "test"
) -> dict[str, Any]:
    """Compose misleading images by every method and pair of classes; count successes before and after the filter."""
    data = worlds.WORLDS["imagenet"](split, 64, seed)
    styles = worlds.STYLES[split]
    can, cards = Drawable.of(reader.cards.texts, styles), reader.cards
    images = data.read(range(min(len(data), 32))).image
    rows: list[dict[str, Any]] = []
    total = {way: [0, 0, 0, 0] for way in WAYS}
    for true, wrong in tqdm(class_pairs(data, pairs, seed), "pairs", disable=None, leave=False):
        near = synonyms(cards, clip.embed_texts(reader.base, [wrong], clip.TEMPLATES)[0])
        row: dict[str, Any] = {"true": true, "wrong": wrong}
        for way in WAYS:
            found = [] if way == "nothing" else words_for(reader, way, true, wrong, can, words, seed, images)
            scene, alone, shown = compose(true, found, can, n, styles, generator("compose", true, wrong, seed))
            hit = prefers(reader.base, scene.image, true, wrong)
            kept = passes(scene, alone, shown, wrong, near)
            got = [int(hit.sum()), len(hit), int((hit & kept).sum()), int(kept.sum())]
            total[way] = [a + b for a, b in zip(total[way], got, strict=True)]
            row[way] = {"before": got[:2], "after": got[2:], "words": found}
        rows.append(row)
    summary = {
        way: {
            "before": round(a / max(b, 1), 4), "n_before": b, "after": round(c / max(d, 1), 4), "n_after": d,
        }
        for way, (a, b, c, d) in total.items()
    }  # fmt: skip
    return {"ways": summary, "pairs": rows, "pictures": n, "words": words}
