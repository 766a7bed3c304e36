"""The lab's bank of captions: names, grounds, counts, colours and pairs, made and not collected.

    python -m training.mils.bank > patches/lab/mils/bank.txt

The paper's bank holds lines about 1,000 ImageNet classes; this one lines about the lab's 100. No line names two things
that one picture of the test split shows, so no test picture's own caption is in it.
"""

from __future__ import annotations

import sys
from functools import cache

import torch

from training.lab import atlas, pool, worlds
from training.lab.company import company_classes
from training.lab.renderer import GROUNDS, generator
from training.mils.draw import LIGHTS
from training.mils.scenes import pairs
from training.tasks.captions import named

LINES = 3400
"""so many, of which the pairs are drawn at random"""


@cache
def lines() -> tuple[str, ...]:
    classes = worlds.imagenet_classes()
    out: dict[str, None] = {}
    for name in classes:
        out[f"a picture of a {name}"] = None
        out |= dict.fromkeys(f"a picture of a {name} on {ground}" for ground in GROUNDS)
        out[f"a picture of two {name}"] = None
    for name in atlas.load().names:
        if pool.coloured(name):
            out[f"a picture of a {name}"] = None
    for ground in GROUNDS:
        out[f"a picture of {ground}"] = None
    known = {frozenset(pair) for pair in pairs("test")}
    g = generator("mils/bank", 0)
    while len(out) < LINES:
        a, b, at = (int(torch.randint(n, (), generator=g)) for n in (len(classes), len(classes), 2 * len(GROUNDS)))
        if a != b and frozenset((classes[a], classes[b])) not in known:
            where = f" on {GROUNDS[at]}" if at < len(GROUNDS) else ""
            out[f"a picture of a {classes[a]} and a {classes[b]}{where}"] = None
    return tuple(out)


@cache
def company(apart: tuple[frozenset[str], ...]) -> tuple[str, ...]:
    """Lines about one to three of the 80 things of lab:vlm's scenes; none says just the things of one of `apart`."""
    classes = company_classes()
    out = {f"a picture of a {name}": None for name in classes}
    out |= {f"a picture of a {name} on {ground}": None for name in classes for ground in GROUNDS}
    g = generator("mils/company", 0)
    while len(out) < LINES:
        some = [classes[i] for i in torch.randperm(len(classes), generator=g)[: 2 + len(out) % 2].tolist()]
        if frozenset(some) not in apart:
            out["a picture of a " + " and a ".join(some)] = None
    return tuple(line for line in out if frozenset(named(line, classes)) not in apart)


HEADS = ("a picture", "a drawing", "an icon", "a cartoon", "a painting", "a large picture", "a simple drawing")
TAILS = ("", " on plain paper", " in the middle", " on snow", " with a white background", " in bright colours")


@cache
def drawable(split: str) -> tuple[str, ...]:
    """Names of animals, plants and food that lab:diffusion was trained on; a third of them each split's."""
    lab = atlas.load()
    names = [n for n, g in zip(lab.names, lab.groups, strict=True)
             if g in ("animals-nature", "food-drink") and len(n) <= 20]  # fmt: skip
    order = torch.randperm(len(names), generator=generator("mils/drawable", 0)).tolist()
    return tuple(names[i] for i in order[("test", "val", "train").index(split) :: 3])


@cache
def prompts() -> tuple[str, ...]:
    """Lines that prompts are rewritten with: ways to say it, about names of train; no line says a name of test."""
    out = [f"{head} of a {name}{tail}" for head in HEADS for tail in TAILS for name in drawable("train")]
    return tuple(out[i] for i in torch.randperm(len(out), generator=generator("mils/prompts", 0)).tolist())


@cache
def looks(split: str) -> dict[str, tuple[str, ...]]:
    """The lights in which a split's styles show every ground: three of the eight each for test and train, two for
    val."""
    names, part = tuple(LIGHTS), {"test": slice(0, 3), "val": slice(3, 5), "train": slice(5, 8)}[split]
    g = generator("mils/looks", 0)
    order = {ground: torch.randperm(len(names), generator=g).tolist() for ground in GROUNDS}
    return {ground: tuple(names[i] for i in order[ground][part]) for ground in GROUNDS}


@cache
def styles() -> tuple[str, ...]:
    """Lines that say a ground, a light, or both as styles of train have them, of every class; the first ones say every
    look once."""
    both = [f"on {ground} in {light}" for ground, lights in looks("train").items() for light in lights]
    said = [*(f"on {ground}" for ground in GROUNDS), *(f"in {light}" for light in LIGHTS), *both]
    g = generator("mils/styles", 0)
    classes = [c for c in worlds.imagenet_classes() if not named(c, (*GROUNDS, *LIGHTS))]  # a water wave is no water
    order = [torch.randperm(len(classes), generator=g).tolist() for _ in said]
    return tuple(
        f"a picture of a {classes[o[k]]} {look}"
        for k in range(len(classes))
        for look, o in zip(said, order, strict=True)
    )


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
