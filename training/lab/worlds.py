"""Twins of the papers' data sets, drawn by the lab's renderer: what is true of every picture is known.

| world | twin of | what is biased or attacked | unseen in test |
|---|---|---|---|
| `imagenet` | ImageNet, 100 classes | nothing | styles |
| `typographic` | RTA-100, SCAM, IN-100-Typo | a word is written on the picture | classes, words, a font |
| `waterbirds` | Waterbirds | kind of bird and ground, 95 % in train | styles |
| `celeba` | CelebA | hair colour and gender, 94 % of the blond in train | styles |
| `coco` | COCO, POPE | things that come in pairs, 90 % in train | styles |
| `actions` | UCF101, Kinetics | nothing; what moves says nothing of how | styles |

Every world is a function of (split, n, seed) that gives a `Dataset`; same arguments, same pictures. Splits: `train`,
`val` and `test` share no sprite and no texture of the ground, `held` is `test` in the style that no lab model was
trained on. Choose on val, report test. docs/lab/ has a picture of each:

    python -m training.lab.worlds docs/lab
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Generator, Tensor

from registry.errors import Invalid, NotFound
from training.data.images import Dataset
from training.lab import atlas
from training.lab.drawing import (
    MOTIONS,
    SEEN,
    STYLES,
    TEXTURES,
    Split,
    dataset_of,
    drawn_from,
    each_frame,
    large_thing,
    moved_things,
    pick_sprites,
    portraits,
    seeded,
    shuffled,
    so_many,
    told_apart,
    two_labels,
)
from training.lab.renderer import (
    FONTS,
    GROUNDS,
    SIZE,
    Layout,
    choose,
    generator,
    grounds,
    things,
    uniform,
    writing,
)

SHORT = 11
"""letters of the longest class name that can be written large enough to be read"""
LAND, WATER = ("grass", "sand"), ("water",)
LANDBIRDS = ("bird", "chicken", "dove", "eagle", "owl", "parrot", "peacock", "rooster", "turkey", "dodo")
WATERBIRDS = ("duck", "flamingo", "goose", "penguin", "swan")
ATTRIBUTES = ("male", "blond", "red", "white", "curly", "bald", "beard", "old")
"""of a portrait; hair that has none of the five is drawn brown or black"""
PAIRS = (
    ("chicken", "egg"), ("mouse", "cheese wedge"), ("monkey", "banana"), ("rabbit", "carrot"), ("bear", "honey pot"),
    ("cow", "glass of milk"), ("spider", "spider web"), ("envelope", "postbox"), ("camel", "cactus"),
    ("horse", "red apple"), ("key", "locked"), ("hammer", "nut and bolt"), ("guitar", "microphone"),
    ("candle", "birthday cake"), ("pizza", "tomato"), ("hamburger", "french fries"), ("fishing pole", "fish"),
    ("soccer ball", "goal net"), ("desktop computer", "keyboard"), ("snowman", "snowflake"),
    ("pen", "memo"), ("santa claus", "wrapped gift"), ("koala", "herb"), ("artist palette", "paintbrush"),
)  # fmt: skip
"""things that come together in `coco`"""
COMPANY = ("biased", "alone", "pair", "neutral", "loose", "full")
"""what `company` draws: biased, the first of a pair in 70 % of the scenes and its partner with it in most of these;
alone, the first without its partner; pair, both; neutral, no first of any pair; loose, anything with anything; full, as
loose with one thing in every quarter"""
CAPTIONED: dict[str, tuple[str, ...]] = {
    "train": tuple(s for s in SEEN if s != "twemoji"),
    "val": tuple(s for s in SEEN if s != "twemoji"),
    "test": ("twemoji",),
    "held": (atlas.HELD,),
}
"""styles of `company`: twemoji alone is unseen by a captioner, since other sets miss some of its classes; val differs
from train by seed and by the textures of the ground, not by style"""


# ---- classes ------------------------------------------------------------------------------------------------------


@cache
def imagenet_classes() -> tuple[str, ...]:
    """100 names: 60 of animals, plants and food, 40 of objects, activities and places; short, drawn in every style."""
    lab, g = atlas.load(), generator("imagenet", "classes")
    everywhere = (lab.table >= 0).all(1).tolist()
    out: list[str] = []
    for groups, count in ((("animals-nature", "food-drink"), 60), (("objects", "activities", "travel-places"), 40)):
        names = [n for n in _short(*groups) if everywhere[lab.find(n)]]
        out += [names[i] for i in torch.randperm(len(names), generator=g)[:count].tolist()]
    return tuple(sorted(out))


@cache
def typographic_classes(split: Split) -> tuple[str, ...]:
    """Short names of animals, plants and food: two fifths for train, one for val, two for test; held: those of test
    that the held-out style has."""
    lab, names = atlas.load(), _short("animals-nature", "food-drink")
    order = torch.randperm(len(names), generator=generator("typographic", "classes")).tolist()
    a, b = round(0.4 * len(names)), round(0.6 * len(names))
    mine = {"train": order[:a], "val": order[a:b]}.get(split, order[b:])
    found = [names[i] for i in mine]
    if split == "held":
        found = [n for n in found if lab.table[lab.find(n), lab.styles.index(atlas.HELD)] >= 0]
    return tuple(sorted(found))


def _short(*groups: str) -> list[str]:
    lab = atlas.load()
    return [n for n, g in zip(lab.names, lab.groups, strict=True) if g in groups and len(n) <= SHORT]


# ---- worlds -------------------------------------------------------------------------------------------------------


def imagenet(split: Split = "test", n: int = 2000, seed: int = 0, device: str = "cpu") -> Dataset:
    """One thing of 100 classes on a random ground. Extras: those of `extras_of`."""
    lab, classes = atlas.load(), imagenet_classes()
    g = seeded("imagenet", split, n, seed)
    label = shuffled(torch.arange(n) % len(classes), g)
    sprite = pick_sprites(label, [[lab.find(c)] for c in classes], STYLES[split], g)
    layout = Layout(grounds(n, g, textures=TEXTURES[split]), large_thing(sprite, g))
    return dataset_of("imagenet", split, classes, layout, label, {}, {"seed": seed}, device)


def typographic(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    word: Literal["none", "blank", "own", "wrong"] = "wrong",
    fonts: Sequence[str] | None = None,
    device: str = "cpu",
) -> Dataset:
    """One thing, large, and a strip over it; only `word` differs between pictures of the same split, n and seed.

    word: none, no strip; blank, the strip without letters, so what covering alone costs; own, the thing's name; wrong,
    the name of another class of this split that shares no word with it. fonts: names out of FONTS; by default sans,
    serif and mono to fit, and all four to test.
    Extras: `word` (names), `word_label` (B,) the class that is written, -1 if none; two-way success is label against
    word_label, top-1 is over all classes. Every split's classes, and so its words, are its own.
    """
    if word not in ("none", "blank", "own", "wrong"):
        raise Invalid(f"word={word!r:.40} must be none, blank, own or wrong.")
    lab, classes = atlas.load(), typographic_classes(split)
    fonts = tuple(fonts or (tuple(FONTS)[:3] if split in ("train", "val") else FONTS))
    if odd := [f for f in fonts if f not in FONTS]:
        raise NotFound(f"There is no font {odd[0]!r:.40}. Fonts: {', '.join(FONTS)}.")
    g = seeded("typographic", split, n, seed)
    label = shuffled(torch.arange(n) % len(classes), g)
    styles = (atlas.HELD,) if split == "held" else SEEN
    sprite = pick_sprites(label, [[lab.find(c)] for c in classes], styles, g)
    wrong = torch.multinomial(told_apart(classes)[label], 1, generator=g)[:, 0]
    layout = Layout(grounds(n, g, textures=TEXTURES[split]), large_thing(sprite, g))
    written = label if word == "own" else wrong
    text = writing([classes[i] for i in written.tolist()], g, fonts)
    if word != "none":
        layout = replace(layout, writing=replace(text, blank=word == "blank"))
    said = written if word in ("own", "wrong") else torch.full((n,), -1)
    about = {"seed": seed, "word": word, "fonts": list(fonts)}
    return dataset_of("typographic", split, classes, layout, label, {"word_label": said}, about, device)


def waterbirds(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    correlation: float = 0.95,
    device: str = "cpu",
    fold: str = "",
) -> Dataset:
    """Birds of the land (label 0) and of the water (1), smallish, anywhere, on land or water.

    In train a share `correlation` of each class stands on its own ground; the other splits are balanced. fold: one of
    HANDS. Extras: `place` (B,) 0 land, 1 water; `group` (B,) 2 * label + place.
    """
    lab = atlas.load()
    g = seeded("waterbirds", split, n, seed)
    label, place = two_labels(n, (correlation, correlation) if split == "train" else (0.5, 0.5), g)
    styles, textures = drawn_from(split, fold)
    kinds = [[lab.find(b) for b in birds] for birds in (LANDBIRDS, WATERBIRDS)]
    sprite = pick_sprites(label, kinds, styles, g)
    land, water = (choose(torch.tensor([GROUNDS.index(k) for k in of]), (n,), g) for of in (LAND, WATER))
    layout = Layout(
        grounds(torch.where(place == 1, water, land), g, textures=textures),
        things(sprite, g, size=(0.35, 0.6)),
    )
    extras = {"place": place, "group": 2 * label + place}
    about = {"seed": seed, "correlation": correlation} | ({"fold": fold} if fold else {})
    return dataset_of("waterbirds", split, ("landbird", "waterbird"), layout, label, extras, about, device)


def celeba(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    target: str = "blond",
    spurious: str = "male",
    correlation: float = 0.94,
    device: str = "cpu",
    fold: str = "",
) -> Dataset:
    """Portraits of men and women in six skin tones. label: has the attribute `target` or not.

    In train a share `correlation` of those with the target lack the spurious attribute (of CelebA's blond, 94 % are
    women) and half of the others have it; the other splits are balanced. fold: one of HANDS. Extras: `attributes`
    (B, 8) bool, see ATTRIBUTES; `place` (B,) the spurious attribute; `group` (B,) 2 * label + place; `tone` (B,).
    """
    if bad := [a for a in (target, spurious) if a not in ATTRIBUTES]:
        raise NotFound(f"There is no attribute {bad[0]!r:.40}. Attributes: {', '.join(ATTRIBUTES)}.")
    lab = atlas.load()
    g = seeded("celeba", split, n, seed)
    people = portraits()
    t, s = ATTRIBUTES.index(target), ATTRIBUTES.index(spurious)
    label, place = two_labels(n, (0.5, 1 - correlation) if split == "train" else (0.5, 0.5), g, signed=False)
    kinds = [
        [c for c, has in people.items() if (has[t], has[s]) == (y, p)] for y in (False, True) for p in (False, True)
    ]
    styles, textures = drawn_from(split, fold)
    sprite = pick_sprites(2 * label + place, kinds, styles, g, tones=True)
    layout = Layout(grounds(n, g, textures=textures), things(sprite, g, size=(0.6, 0.9), turn=0.15, tint=0.4))
    has = torch.tensor([people[c] for c in lab.concept[sprite].tolist()])
    extras = {"attributes": has, "place": place, "group": 2 * label + place, "tone": lab.tone[sprite]}
    about = {"seed": seed, "target": target, "spurious": spurious, "correlation": correlation}
    about |= {"fold": fold} if fold else {}
    return dataset_of("celeba", split, (f"not {target}", target), layout, label, extras, about, device)


def coco(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    correlation: float = 0.9,
    device: str = "cpu",
    kind: str = "crowd",
) -> Dataset:
    """Three things: the first of a pair (label: which pair), its partner or not, and others. Another kind: `company`.

    In train the partner is there with probability `correlation`, elsewhere with 1/2; where it is not, a thing of
    another pair stands in its place. Extras: `objects` (B, 2 * pairs) bool over `coco_classes()`, `partner` (B,) bool;
    POPE's adversarial question is the partner of what is there, its random one any other class.
    """
    if kind != "crowd":
        return company(split, n, seed, kind, correlation, device=device)
    lab, classes = atlas.load(), coco_classes()
    g = seeded("coco", split, n, seed)
    pairs = len(PAIRS)
    label = shuffled(torch.arange(n) % pairs, g)
    partner = so_many(n, correlation if split == "train" else 0.5)[torch.randperm(n, generator=g)]
    other = (label + torch.randint(1, pairs, (n,), generator=g)) % pairs
    third = (label + torch.randint(1, pairs, (n,), generator=g)) % pairs
    third = torch.where((third == other), (third + 1) % pairs, third)
    third = torch.where((third == label), (third + 1) % pairs, third)
    third = torch.where((third == other), (third + 1) % pairs, third)
    second = torch.where(partner, label + pairs, other + pairs * torch.randint(2, (n,), generator=g))
    there = torch.stack([label, second, third + pairs * torch.randint(2, (n,), generator=g)], 1)
    kinds = [[lab.find(c)] for c in classes]
    sprite = torch.stack([pick_sprites(column, kinds, STYLES[split], g) for column in there.unbind(1)], 1)
    objects = torch.zeros(n, len(classes), dtype=torch.bool).scatter_(1, there, True)
    layout = Layout(grounds(n, g, textures=TEXTURES[split]), things(sprite, g))
    extras = {"objects": objects, "partner": partner}
    about = {"seed": seed, "correlation": correlation}
    return dataset_of("coco", split, tuple(a for a, _ in PAIRS), layout, label, extras, about, device)


def company(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    kind: str = "alone",
    correlation: float = 0.9,
    size: int = 2 * SIZE,
    device: str = "cpu",
) -> Dataset:
    """`coco` for captioners: one to three things, each in its own quarter, in controlled company (`kind`: COMPANY).

    What a captioner invents on `alone` and not on `neutral` it learned from company. A pair's first never comes but by
    `kind`, its partner comes without it in a quarter of the scenes. label: the pair whose first is there, -1 none.
    Extras: `things` (B, 3 or 4) index of `company_classes()`, -1 nothing; `objects` (B, 80) bool over them; `partner`
    (B,) index of the pair's partner, -1 without a first; and those of `extras_of`. Raises Invalid for another kind.
    """
    if kind not in COMPANY:
        raise Invalid(f"kind={kind!r:.40} must be one of {', '.join(COMPANY)}.")
    lab, classes = atlas.load(), company_classes()
    g = company_start(split, n, seed, kind)
    what, head = company_things(n, kind, correlation, g)
    kinds = [[lab.find(c)] for c in classes]
    sprite = torch.stack(
        [pick_sprites(column.clamp(min=0), kinds, CAPTIONED[split], g) for column in what.unbind(1)], 1
    )
    stuff = things(torch.where(what >= 0, sprite, -1), g)
    stuff = replace(stuff, size=uniform(tuple(what.shape), 0.35, 0.42, g))
    layout = Layout(grounds(n, g, textures=TEXTURES[split]), stuff)
    objects = torch.zeros(n, len(classes) + 1, dtype=torch.bool)
    objects = objects.scatter_(1, torch.where(what >= 0, what, len(classes)), True)[:, :-1]
    partner = torch.where(head >= 0, head + len(PAIRS), -1)
    extras = {"things": what, "objects": objects, "partner": partner}
    about = {"seed": seed, "kind": kind, "correlation": correlation, "size": size}
    return dataset_of("coco", split, classes, layout, head, extras, about, device, size=size)


@cache
def company_classes() -> tuple[str, ...]:
    """80 names: the pairs' first things, their partners, and 32 neutral ones that every style drew."""
    free = [n for n in imagenet_classes() if n not in coco_classes() and not n.endswith(" face")]
    return coco_classes() + tuple(free[:: max(1, len(free) // 32)][:32])


def company_start(split: Split, n: int, seed: int, kind: str) -> Generator:
    """What `company` draws from; its first draws are `company_things`."""
    return seeded(f"company/{kind}", split, n, seed)


def company_things(n: int, kind: str, correlation: float, g: Generator) -> tuple[Tensor, Tensor]:
    """(n, 3) things of `company_classes()` (4 if `full`), -1 nothing; (n,) the pair whose first is there, -1 none."""
    pairs, classes = len(PAIRS), len(company_classes())
    count = 1 + torch.multinomial(torch.tensor([0.15, 0.6, 0.25]), n, replacement=True, generator=g)
    if kind in ("loose", "full"):
        out = torch.rand(n, classes, generator=g).argsort(1)[:, : 4 if kind == "full" else 3]
        out = out if kind == "full" else out.masked_fill(torch.arange(3) >= count[:, None], -1)
        return out, torch.full((n,), -1)
    head = torch.randint(pairs, (n,), generator=g)
    if kind == "biased":
        first = torch.rand(n, generator=g) < 0.7
        both = first & (torch.rand(n, generator=g) < correlation)
    else:
        first, both = torch.full((n,), kind != "neutral"), torch.full((n,), kind == "pair")
        count = 2 + (torch.rand(n, generator=g) < 0.2).long()
    others = 2 * pairs + torch.rand(n, classes - 2 * pairs, generator=g).argsort(1)[:, :3]
    stray = pairs + (head + torch.randint(1, pairs, (n,), generator=g)) % pairs  # a partner without its first
    others[:, 0] = torch.where(torch.rand(n, generator=g) < 0.25, stray, others[:, 0])
    cast = torch.cat([torch.where(first, head, -1)[:, None], torch.where(both, head + pairs, -1)[:, None], others], 1)
    there = (cast < 0).long().argsort(dim=1, stable=True)  # those that are there come first
    count = torch.maximum(count, first.long() + both.long())
    out = cast.gather(1, there)[:, :3].masked_fill(torch.arange(3) >= count[:, None], -1)
    return out, torch.where(first, head, -1)


def coco_classes() -> tuple[str, ...]:
    """The first things of all pairs, then their partners."""
    return tuple(a for a, _ in PAIRS) + tuple(b for _, b in PAIRS)


def actions(
    split: Split = "test", n: int = 220, seed: int = 0, frames: int = 16, size: int = SIZE, device: str = "cpu"
) -> Dataset:
    """Clips (B, T, 3, H, W) of one thing that moves one of eleven ways; any thing moves any way.

    Extras have the frames side by side where a picture has one: `box` (B, T, 4), `mask` (B, T, H, W).
    """
    if frames < 2:
        raise Invalid(f"frames={frames}: a clip needs at least two.")
    lab = atlas.load()
    g = seeded("actions", split, n, seed)
    label = shuffled(torch.arange(n) % len(MOTIONS), g)
    ids = [i for i, group in enumerate(lab.groups) if group not in ("smileys-emotion", "people-body")]
    sprite = choose(lab.pick(ids, STYLES[split]), (n,), g)
    ground = grounds(n, g, textures=TEXTURES[split])
    thing = things(sprite, g, size=(0.3, 0.45))
    layout = Layout(each_frame(ground, frames), moved_things(each_frame(thing, frames), label, frames, g))
    about = {"seed": seed, "frames": frames, "size": size}
    return dataset_of("actions", split, MOTIONS, layout, label, {}, about, device, frames, size)


def sheet(data: Dataset, columns: int = 10, rows: int = 2) -> Image.Image:
    """Pictures of a world side by side, in 128 colours so that the file is small; of clips every fourth frame."""
    batch = data.read(range(min(len(data), rows * columns)))
    image = batch.image.cpu()
    if image.ndim == 5:
        image = image[: rows * columns // 5, :: max(1, image.shape[1] // 5)][:, :5].flatten(0, 1)
    grid = image[: rows * columns].reshape(rows, columns, *image.shape[1:]).permute(0, 3, 1, 4, 2)
    pixels = grid.flatten(2, 3).flatten(0, 1).contiguous().numpy()
    return Image.fromarray(pixels).quantize(128, dither=Image.Dither.NONE)


WORLDS: dict[str, Callable[..., Dataset]] = {
    "imagenet": imagenet,
    "typographic": typographic,
    "waterbirds": waterbirds,
    "celeba": celeba,
    "coco": coco,
    "actions": actions,
}
if __name__ == "__main__":
    for _name, _world in WORLDS.items():
        _sheet = sheet(_world("train", 1000), rows=4 if _name == "actions" else 2)
        _sheet.save(Path(sys.argv[1]) / f"{_name}.png", optimize=True)
