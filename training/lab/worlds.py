"""Lab twins of the papers' data sets, rendered from sprites, so that labels, masks and boxes of every image are exact.

| world | twin of | bias or attack | unseen in test |
|---|---|---|---|
| `imagenet` | ImageNet, 100 classes | none | styles |
| `typographic` | RTA-100, SCAM, IN-100-Typo | a word is written on the image | classes, words, a font |
| `waterbirds` | Waterbirds | kind of bird and background correlate, 95 % in train | styles |
| `celeba` | CelebA | hair colour and gender correlate, 94 % of the blond in train | styles |
| `coco` | COCO, POPE | pairs of objects co-occur, 90 % in train | styles |
| `actions` | UCF101, Kinetics | none; object and motion are independent | styles |

Every world is a deterministic function of (split, n, seed) that returns a `Dataset`. `train`, `val` and `test` share no
sprite and no background texture; `held` is `test` in the style that no lab model is trained on. Choose on val, report
test. docs/lab/ shows each world:

    python -m training.lab.worlds docs/lab
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Generator, Tensor

from registry.errors import Invalid, NotFound
from training.data.images import Batch, Dataset
from training.lab import atlas
from training.lab.renderer import (
    FONTS,
    GROUNDS,
    SIZE,
    VERSION,
    Layout,
    Scene,
    Things,
    choose,
    generator,
    grounds,
    render,
    take,
    things,
    uniform,
    writing,
)

Split = Literal["train", "val", "test", "held"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "held")
STYLES: dict[str, tuple[str, ...]] = {
    "train": ("noto", "fluent-emoji", "fluent-emoji-flat"),
    "val": ("openmoji",),
    "test": ("twemoji", "emojione", "emojione-v1"),
    "held": (atlas.HELD,),
}
"""Icon styles of each split, if classes are the same in all; both Fluents stay together: they have one illustrator"""
SEEN = tuple(s for s in atlas.STYLES if s != atlas.HELD)
HANDS: dict[str, tuple[str, ...]] = {
    "noto": ("noto",),
    "fluent-emoji": ("fluent-emoji", "fluent-emoji-flat"),
    "openmoji": ("openmoji",),
}
"""Icon sets of train and val by illustrator. A fold validates on one illustrator's sets, on backgrounds that its
`train`, drawn by the others, does not use; `test` is in no fold"""
_FOLDED = {"train": (0, 16), "val": (16, 28)}
_TEXTURES = {"train": (0, 24), "val": (24, 28), "test": (28, 32), "held": (28, 32)}
SHORT = 11
"""Longest class name, in letters, that can be written large enough to be read"""

LAND, WATER = ("grass", "sand"), ("water",)
LANDBIRDS = ("bird", "chicken", "dove", "eagle", "owl", "parrot", "peacock", "rooster", "turkey", "dodo")
WATERBIRDS = ("duck", "flamingo", "goose", "penguin", "swan")
ATTRIBUTES = ("male", "blond", "red", "white", "curly", "bald", "beard", "old")
"""Attributes of a portrait; hair with none of the five is drawn brown or black"""
PAIRS = (
    ("chicken", "egg"), ("mouse", "cheese wedge"), ("monkey", "banana"), ("rabbit", "carrot"), ("bear", "honey pot"),
    ("cow", "glass of milk"), ("spider", "spider web"), ("envelope", "postbox"), ("camel", "cactus"),
    ("horse", "red apple"), ("key", "locked"), ("hammer", "nut and bolt"), ("guitar", "microphone"),
    ("candle", "birthday cake"), ("pizza", "tomato"), ("hamburger", "french fries"), ("fishing pole", "fish"),
    ("soccer ball", "goal net"), ("desktop computer", "keyboard"), ("snowman", "snowflake"),
    ("pen", "memo"), ("santa claus", "wrapped gift"), ("koala", "herb"), ("artist palette", "paintbrush"),
)  # fmt: skip
"""Pairs of objects that co-occur in `coco`: (first, partner)"""
MOTIONS = ("still", "left", "right", "up", "down", "grow", "shrink", "spin left", "spin right", "swing", "bounce")


# ---- classes ------------------------------------------------------------------------------------------------------


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return 100 class names that every style has: 60 animals, plants and foods; 40 objects, activities and places."""
    lab, g = atlas.load(), generator("imagenet", "classes")
    everywhere = (lab.table >= 0).all(1).tolist()
    out: list[str] = []
    for groups, count in ((("animals-nature", "food-drink"), 60), (("objects", "activities", "travel-places"), 40)):
        names = [n for n in _short(*groups) if everywhere[lab.find(n)]]
        out += [names[i] for i in torch.randperm(len(names), generator=g)[:count].tolist()]
    return tuple(sorted(out))


@cache
def typographic_classes(split: Split) -> tuple[str, ...]:
    """Return a split's classes of animals and food: 40 % train, 20 % val, 40 % test; held: those in its style."""
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
    """Build a 100-class world: one object, large and centred, on a random background. Extras: those of `_extras`."""
    lab, classes = atlas.load(), imagenet_classes()
    g = _start("imagenet", split, n, seed)
    label = _shuffled(torch.arange(n) % len(classes), g)
    sprite = _sprites(label, [[lab.find(c)] for c in classes], STYLES[split], g)
    layout = Layout(grounds(n, g, textures=_TEXTURES[split]), _large(sprite, g))
    return _dataset("imagenet", split, classes, layout, label, {}, {"seed": seed}, device)


def typographic(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    word: Literal["none", "blank", "own", "wrong"] = "wrong",
    fonts: Sequence[str] | None = None,
    device: str = "cpu", varied: float = 0.0,
) -> Dataset:  # fmt: skip
    """Build the typographic attack: one large object under a strip with a word.

    Only the writing differs between images of the same split, n and seed. word: none, no strip; blank, the strip
    without letters (what occlusion alone costs); own, the object's name; wrong, the name of another class of the split
    that shares no word with it. fonts: names in FONTS; by default three to fit, all four to test. varied: share that
    is written otherwise (renderer.writing). Extras: `word` (names), `word_label` (B,) the written class, -1 if none;
    two-way success is of label against it, top-1 of all classes. Classes, and so words, differ between splits.
    """
    if word not in ("none", "blank", "own", "wrong"):
        raise Invalid(f"word={word!r:.40} must be none, blank, own or wrong.")
    lab, classes = atlas.load(), typographic_classes(split)
    fonts = tuple(fonts or (tuple(FONTS)[:3] if split in ("train", "val") else FONTS))
    if odd := [f for f in fonts if f not in FONTS]:
        raise NotFound(f"There is no font {odd[0]!r:.40}. Fonts: {', '.join(FONTS)}.")
    g = _start("typographic", split, n, seed)
    label = _shuffled(torch.arange(n) % len(classes), g)
    styles = (atlas.HELD,) if split == "held" else SEEN
    sprite = _sprites(label, [[lab.find(c)] for c in classes], styles, g)
    wrong = torch.multinomial(_apart(classes)[label], 1, generator=g)[:, 0]
    layout = Layout(grounds(n, g, textures=_TEXTURES[split]), _large(sprite, g))
    written = label if word == "own" else wrong
    text = writing([classes[i] for i in written.tolist()], g, fonts, varied)
    if word != "none":
        layout = replace(layout, writing=replace(text, blank=word == "blank"))
    said = written if word in ("own", "wrong") else torch.full((n,), -1)
    about = {"seed": seed, "word": word, "fonts": list(fonts)} | ({"varied": varied} if varied else {})
    return _dataset("typographic", split, classes, layout, label, {"word_label": said}, about, device)


def waterbirds(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    correlation: float = 0.95,
    device: str = "cpu",
    fold: str = "",
) -> Dataset:
    """Build Waterbirds: landbirds (label 0) and waterbirds (1), small, anywhere on a land or water background.

    In train a fraction `correlation` of each class is on its own kind of background; other splits are balanced. fold:
    one of HANDS. Extras: `place` (B,) 0 land, 1 water; `group` (B,) 2 * label + place.
    """
    lab = atlas.load()
    g = _start("waterbirds", split, n, seed)
    label, place = _two(n, (correlation, correlation) if split == "train" else (0.5, 0.5), g)
    styles, textures = _drawn(split, fold)
    kinds = [[lab.find(b) for b in birds] for birds in (LANDBIRDS, WATERBIRDS)]
    sprite = _sprites(label, kinds, styles, g)
    land, water = (choose(torch.tensor([GROUNDS.index(k) for k in of]), (n,), g) for of in (LAND, WATER))
    layout = Layout(
        grounds(torch.where(place == 1, water, land), g, textures=textures),
        things(sprite, g, size=(0.35, 0.6)),
    )
    extras = {"place": place, "group": 2 * label + place}
    about = {"seed": seed, "correlation": correlation} | ({"fold": fold} if fold else {})
    return _dataset("waterbirds", split, ("landbird", "waterbird"), layout, label, extras, about, device)


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
    """Build CelebA: portraits of men and women in six skin tones. label: whether the attribute `target` is present.

    In train a fraction `correlation` of those with the target lack the spurious attribute (94 % of CelebA's blond are
    women) and half of the others have it; other splits are balanced. fold: one of HANDS. Extras: `attributes` (B, 8)
    bool, see ATTRIBUTES; `place` (B,) the spurious attribute; `group` (B,) 2 * label + place; `tone` (B,).
    """
    if bad := [a for a in (target, spurious) if a not in ATTRIBUTES]:
        raise NotFound(f"There is no attribute {bad[0]!r:.40}. Attributes: {', '.join(ATTRIBUTES)}.")
    lab = atlas.load()
    g = _start("celeba", split, n, seed)
    people = _portraits()
    t, s = ATTRIBUTES.index(target), ATTRIBUTES.index(spurious)
    label, place = _two(n, (0.5, 1 - correlation) if split == "train" else (0.5, 0.5), g, signed=False)
    kinds = [
        [c for c, has in people.items() if (has[t], has[s]) == (y, p)] for y in (False, True) for p in (False, True)
    ]
    styles, textures = _drawn(split, fold)
    sprite = _sprites(2 * label + place, kinds, styles, g, tones=True)
    layout = Layout(grounds(n, g, textures=textures), things(sprite, g, size=(0.6, 0.9), turn=0.15, tint=0.4))
    has = torch.tensor([people[c] for c in lab.concept[sprite].tolist()])
    extras = {"attributes": has, "place": place, "group": 2 * label + place, "tone": lab.tone[sprite]}
    about = {"seed": seed, "target": target, "spurious": spurious, "correlation": correlation}
    about |= {"fold": fold} if fold else {}
    return _dataset("celeba", split, (f"not {target}", target), layout, label, extras, about, device)


def coco(
    split: Split = "test",
    n: int = 2000,
    seed: int = 0,
    correlation: float = 0.9,
    device: str = "cpu",
    kind: str = "crowd",
) -> Dataset:
    """Build three objects per image: the first of a co-occurring pair (the label), its partner or not, and others.

    In train the partner is present with probability `correlation`, elsewhere with 1/2; otherwise an object of another
    pair takes its place. Extras: `objects` (B, 2 * pairs) bool over `coco_classes()`, `partner` (B,) bool. POPE asks
    for the partner (adversarial) or any other class (random). Other kinds: company.py.
    """
    if kind != "crowd":
        from training.lab.company import company  # which imports this module

        return company(split, n, seed, kind, correlation, device=device)
    lab, classes = atlas.load(), coco_classes()
    g = _start("coco", split, n, seed)
    pairs = len(PAIRS)
    label = _shuffled(torch.arange(n) % pairs, g)
    partner = _share(n, correlation if split == "train" else 0.5)[torch.randperm(n, generator=g)]
    other = (label + torch.randint(1, pairs, (n,), generator=g)) % pairs
    third = (label + torch.randint(1, pairs, (n,), generator=g)) % pairs
    third = torch.where((third == other), (third + 1) % pairs, third)
    third = torch.where((third == label), (third + 1) % pairs, third)
    third = torch.where((third == other), (third + 1) % pairs, third)
    second = torch.where(partner, label + pairs, other + pairs * torch.randint(2, (n,), generator=g))
    there = torch.stack([label, second, third + pairs * torch.randint(2, (n,), generator=g)], 1)
    kinds = [[lab.find(c)] for c in classes]
    sprite = torch.stack([_sprites(column, kinds, STYLES[split], g) for column in there.unbind(1)], 1)
    objects = torch.zeros(n, len(classes), dtype=torch.bool).scatter_(1, there, True)
    layout = Layout(grounds(n, g, textures=_TEXTURES[split]), things(sprite, g))
    extras = {"objects": objects, "partner": partner}
    about = {"seed": seed, "correlation": correlation}
    return _dataset("coco", split, tuple(a for a, _ in PAIRS), layout, label, extras, about, device)


def coco_classes() -> tuple[str, ...]:
    """Return the class names: the first objects of all pairs, then their partners."""
    return tuple(a for a, _ in PAIRS) + tuple(b for _, b in PAIRS)


def actions(
    split: Split = "test", n: int = 220, seed: int = 0, frames: int = 16, size: int = SIZE, device: str = "cpu"
) -> Dataset:
    """Build clips (B, T, 3, H, W) of one object in one of eleven motions (the label), whatever the object.

    Extras get a frame axis where an image has none: `box` (B, T, 4), `mask` (B, T, H, W). Raises Invalid for one frame.
    """
    if frames < 2:
        raise Invalid(f"frames={frames}: a clip needs at least two.")
    lab = atlas.load()
    g = _start("actions", split, n, seed)
    label = _shuffled(torch.arange(n) % len(MOTIONS), g)
    ids = [i for i, group in enumerate(lab.groups) if group not in ("smileys-emotion", "people-body")]
    sprite = choose(lab.pick(ids, STYLES[split]), (n,), g)
    ground = grounds(n, g, textures=_TEXTURES[split])
    thing = things(sprite, g, size=(0.3, 0.45))
    layout = Layout(_each(ground, frames), _moved(_each(thing, frames), label, frames, g))
    about = {"seed": seed, "frames": frames, "size": size}
    return _dataset("actions", split, MOTIONS, layout, label, {}, about, device, frames, size)


def sheet(data: Dataset, columns: int = 10, rows: int = 2) -> Image.Image:
    """Tile images, or five frames of each clip, into one contact sheet of 128 colours, which makes a small file."""
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


# ---- their parts --------------------------------------------------------------------------------------------------


def _start(name: str, split: str, n: int, seed: int) -> Generator:
    """Check a world's arguments and return its seeded generator. Raises Invalid for an unknown split or a bad n."""
    if split not in SPLITS:
        raise Invalid(f"split={split!r:.40} must be one of {', '.join(SPLITS)}.")
    if not 1 <= n <= 10_000_000:
        raise Invalid(f"n={n} must be between 1 and 10 million.")
    return generator(name, split, n, seed)


def _drawn(split: str, fold: str) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Return a split's styles and texture range. Raises NotFound for an unknown fold, or a split that is in no fold."""
    if not fold:
        return STYLES[split], _TEXTURES[split]
    if fold not in HANDS or split not in _FOLDED:
        raise NotFound(f"fold={fold!r:.40} of {split}: folds are {', '.join(HANDS)}, of {' and '.join(_FOLDED)}.")
    every = STYLES["train"] + STYLES["val"]
    return HANDS[fold] if split == "val" else tuple(s for s in every if s not in HANDS[fold]), _FOLDED[split]


def _shuffled(x: Tensor, g: Generator) -> Tensor:
    return x[torch.randperm(len(x), generator=g)]


def _share(n: int, share: float) -> Tensor:
    """Return (n,) bool with floor(n * share) true values, evenly spread."""
    edge = (torch.arange(n + 1, dtype=torch.float64) * share + 1e-9).floor()
    return edge[1:] > edge[:-1]


def _two(n: int, shares: tuple[float, float], g: Generator, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Draw balanced labels and correlated attributes, both (n,) of 0 or 1; shares: per label, the fraction with place 1
    (signed: with place == label)."""
    label = torch.arange(n) % 2
    place = torch.empty(n, dtype=torch.int64)
    for y in (0, 1):
        share = _share(len(label[y::2]), shares[y]).long()
        place[y::2] = 1 - share if signed and y == 0 else share
    order = torch.randperm(n, generator=g)
    return label[order], place[order]


def _sprites(
    label: Tensor, kinds: Sequence[Sequence[int]], styles: Sequence[str], g: Generator, tones: bool = False
) -> Tensor:
    """Draw a sprite (n,) for each label: uniformly a concept of its kind in these styles, then one of its sprites."""
    table, wide, deep = _pools(tuple(map(tuple, kinds)), tuple(styles), tones)
    which = (torch.rand(len(label), generator=g) * wide[label]).long()
    one = (torch.rand(len(label), generator=g) * deep[label, which]).long()
    return table[label, which, one]


@lru_cache(64)
def _pools(kinds: tuple[tuple[int, ...], ...], styles: tuple[str, ...], tones: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a padded table of sprites (kinds, widest, deepest), and how many concepts (kinds,), and sprites of each
    concept (kinds, widest), are real."""
    lab = atlas.load()
    pools: list[list[Tensor]] = []
    for concepts in kinds:
        drawn = [p for c in concepts if len(p := lab.pick([c], styles, tones))]
        if not drawn:
            who = ", ".join(lab.names[c] for c in concepts[:4]) or "the class"
            raise NotFound(f"Nobody drew {who} in {', '.join(styles)}; take another split or attribute.")
        pools.append(drawn)
    widest = max(len(p) for p in pools)
    deepest = max(len(s) for p in pools for s in p)
    table = torch.stack([torch.stack([p[i % len(p)].repeat(deepest)[:deepest] for i in range(widest)]) for p in pools])
    wide = torch.tensor([len(p) for p in pools])
    deep = torch.tensor([[len(p[i % len(p)]) for i in range(widest)] for p in pools])
    return table, wide, deep


@lru_cache(16)
def _apart(names: tuple[str, ...]) -> Tensor:
    """Return (C, C) float32: 1 where two names share no word."""
    words = [set(n.split()) for n in names]
    return torch.tensor([[not a & b for b in words] for a in words]).float()


def _large(sprite: Tensor, g: Generator) -> Things:
    """Lay out one object, centred, upright and unjittered, as a zero-shot benchmark shows it."""
    return things(sprite, g, size=(0.75, 0.95), centred=True, turn=0.0, tint=0.0)


@cache
def _portraits() -> dict[int, tuple[bool, ...]]:
    """Map each portrait concept (a person without a role) to its values of ATTRIBUTES."""
    lab, out = atlas.load(), {}
    for c, (name, subgroup) in enumerate(zip(lab.names, lab.subgroups, strict=True)):
        who = atlas.person(name)
        if subgroup == "person" and who and who.gender and who.age in ("", "old"):
            hair = tuple(who.hair == h for h in ("blond", "red", "white", "curly", "bald"))
            out[c] = (who.gender == "man", *hair, who.beard, who.age == "old")
    return out


def _each(part: Any, frames: int) -> Any:
    return type(part)(**{k: v.repeat_interleave(frames, 0) for k, v in vars(part).items()})


def _moved(thing: Things, label: Tensor, frames: int, g: Generator) -> Things:
    """Move the objects of n * frames images along their clips' motions (label (n,))."""
    n = len(label)
    t = torch.linspace(0, 1, frames).repeat(n)
    move = label.repeat_interleave(frames)
    speed = uniform((n,), 0.7, 1.0, g).repeat_interleave(frames)
    phase = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0).repeat_interleave(frames)
    is_ = {name: (move == i).float() for i, name in enumerate(MOTIONS)}
    x, y = thing.centre[:, 0].unbind(-1)
    way = (2 * t - 1) * 0.55 * speed
    sideways, upright = is_["left"] + is_["right"], is_["up"] + is_["down"]
    swing, bounce = is_["swing"], is_["bounce"]
    x = x * 0.5 * (1 - sideways - swing) + (is_["right"] - is_["left"]) * way
    x = x + swing * phase * 0.5 * speed * torch.sin(2 * math.tau * t)
    y = y * 0.5 * (1 - upright - bounce) + (is_["down"] - is_["up"]) * way
    y = y + bounce * (0.45 - 0.9 * speed * torch.sin(2 * math.pi * t).abs())
    grown = 1 + 0.9 * speed * t
    size = thing.size[:, 0] * (1 + is_["grow"] * (grown - 1)) * (1 + is_["shrink"] * (1.9 / grown - 1))
    turn = thing.turn[:, 0] + (is_["spin right"] - is_["spin left"]) * 1.5 * math.pi * speed * t
    return replace(thing, centre=torch.stack([x, y], -1)[:, None], size=size[:, None], turn=turn[:, None])


def _extras(scene: Scene) -> dict[str, Any]:
    """Return a scene's ground truth: `concept`, `style`, `box`, `mask` of the first object, `ground`, `word`,
    `letters`, `strip` (B, R, R), `word_box`; with several objects also `concepts`, `boxes`, `masks` (B, K, ...)."""
    many = {"concepts": scene.concept, "boxes": scene.box, "masks": scene.mask} if scene.concept.shape[1] > 1 else {}
    return {
        **many,
        "concept": scene.concept[:, 0],
        "style": scene.style[:, 0],
        "box": scene.box[:, 0],
        "mask": scene.mask[:, 0],
        "ground": scene.ground,
        "word": scene.words,
        "letters": scene.letters,
        "strip": scene.strip,
        "word_box": scene.word_box,
    }


def _dataset(
    name: str,
    split: str,
    classes: tuple[str, ...],
    layout: Layout,
    label: Tensor,
    own: dict[str, Tensor],
    about: dict[str, Any],
    device: str,
    frames: int = 0,
    size: int = SIZE,
) -> Dataset:
    def read(rows: Tensor) -> Batch:
        pictures = (rows[:, None] * frames + torch.arange(frames)).flatten() if frames else rows
        scene = render(take(layout, pictures), device, size)
        image, extras = scene.image, _extras(scene)
        if frames:
            clip = len(rows), frames
            image = image.view(*clip, *image.shape[1:])
            extras = {
                k: (v := extras[k]).view(*clip, *v.shape[1:]) for k in ("concept", "style", "box", "mask", "ground")
            }
        return Batch(image, label[rows].to(device), {**extras, **{k: v[rows].to(device) for k, v in own.items()}})

    about = {**about, "atlas": atlas.load().digest, "renderer": VERSION}
    return Dataset(f"lab:{name}", split, classes, len(label), about, read)


if __name__ == "__main__":
    for _name, _world in WORLDS.items():
        _sheet = sheet(_world("train", 1000), rows=4 if _name == "actions" else 2)
        _sheet.save(Path(sys.argv[1]) / f"{_name}.png", optimize=True)
