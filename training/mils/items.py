"""The items of a task: what the scorer is given, what is true of it, and what captions of it say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patches.families.base import Base
from patches.families.search.backdrops import lit
from registry.errors import ConfigError
from training.lab import atlas, worlds
from training.lab.company import company_classes
from training.lab.renderer import GROUNDS
from training.lab.worlds import Split
from training.mils import bank as captions
from training.mils import judge, sounds
from training.mils.config import Config
from training.mils.draw import LIGHTS
from training.mils.scenes import MOST, Scenes, clips, scenes
from training.tasks.captions import named


@dataclass(frozen=True)
class Task:
    """n items. Lists run alike."""

    inputs: Sequence[Mapping[str, Any]]
    true: Sequence[tuple[str, ...]]
    """names that a right caption says"""
    names: tuple[str, ...]
    """every name that counts"""
    references: list[list[str]] = field(default_factory=list)
    pictures: Tensor | None = None
    """(n, 3, H, W) uint8 for the judge; None if there are none"""
    drawn: bool = False
    """whether a text is worth what the base draws from it: the only name of `true` is asked of the judge"""
    words: list[str] = field(default_factory=list)
    """what is written on each picture, if something is"""
    starts: list[tuple[str, ...]] = field(default_factory=list)
    """lines of the items' own: the prompt that is rewritten"""
    goals: list[str] = field(default_factory=list)

    @cached_property
    def judged(self) -> Tensor | None:
        """What the judge sees on the pictures (`judge.seen`), looked at once."""
        return judge.seen(self.pictures) if self.pictures is not None else None


def lines(config: Config) -> tuple[str, ...]:
    """The bank of a task. No line says just the things of a test item."""
    made = _lines(config)
    if config.data not in ("plus", "both"):
        return made  # made without them
    n = min(config.items, MOST)
    apart = set(map(frozenset, _sums("test", n) if config.data == "plus" else _sights_and_sounds("test", n)[1]))
    names = (*worlds.imagenet_classes(), *sounds.NAMES)
    return tuple(line for line in made if frozenset(named(line, names)) not in apart)


def _lines(config: Config) -> tuple[str, ...]:
    if config.data == "sounds":
        return sounds.bank()
    if config.data == "both":
        out = []
        classes = worlds.imagenet_classes()
        for i, line in enumerate(captions.lines()):
            out.append(f"{line.partition(' on ')[0]} and a {sounds.NAMES[i % len(sounds.NAMES)]}")
        return tuple(dict.fromkeys([*out, *(f"a picture of a {c}" for c in classes)]))
    if config.data == "company":
        return captions.company(tuple(map(frozenset, _company_of("test", min(config.items, MOST))[1])))
    if config.data == "prompts" and config.renderer:
        return captions.prompts()
    if config.data == "styles":
        return captions.styles()
    return captions.lines()


def items(config: Config, base: Base, split: Split, n: int) -> Task:
    """The first n items of a split, as `base`, the scorer, takes pictures."""
    makers = {"scenes": _scenes, "clips": _clips, "sounds": _sounds, "typographic": _typographic, "prompts": _prompts,
              "styles": _styles, "company": _company, "plus": _plus, "minus": _minus, "both": _both}  # fmt: skip
    if config.data not in makers:
        raise ConfigError(f"data={config.data!r:.40} is none of {', '.join(makers)}.")
    return makers[config.data](config, base, split, n)


def _seen(base: Base, pictures: Tensor) -> list[Tensor]:
    """Every picture (1, 3, H, W) as the scorer takes it."""
    return list(base.processor.image(pictures)[:, None])


def _names() -> tuple[str, ...]:
    return tuple(atlas.load().names)


def _scenes(config: Config, base: Base, split: Split, n: int) -> Task:
    data = scenes(split, n)
    inputs = [{"pixels": x} for x in _seen(base, data.images)]
    return Task(inputs, list(data.things), _names(), data.references, data.images)


def _clips(config: Config, base: Base, split: Split, n: int) -> Task:
    frames, things, where = clips(split, n)
    flat = base.processor.image(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
    references = Scenes(frames[:, 0], things, where).references
    return Task([{"pixels": x} for x in flat], list(things), _names(), references)


def _company_of(split: Split, n: int) -> tuple[Tensor, list[tuple[str, ...]]]:
    """The scenes of 192 px that lab:vlm is measured on, one to three things each in its own quarter, and their
    things."""
    data = worlds.coco(split, MOST, kind="alone")
    batch = data.read(range(n))
    things = [tuple(data.classes[i] for i in row.nonzero()[:, 0].tolist()) for row in batch.extras["objects"]]
    return batch.image, things


def _company(config: Config, base: Base, split: Split, n: int) -> Task:
    images, things = _company_of(split, n)
    return Task([{"pixels": x} for x in _seen(base, images)], things, company_classes(), pictures=images)


def _sounds(config: Config, base: Base, split: Split, n: int) -> Task:
    data = sounds.sounds(split, n, two=True)
    inputs = [{"sound": (x, sounds.RATE)} for x in data.samples]
    references = [[sounds.caption(order) for order in (t, t[::-1])] for t in data.names]
    return Task(inputs, list(data.names), sounds.NAMES, references)


def _typographic(config: Config, base: Base, split: Split, n: int) -> Task:
    batch = worlds.typographic(split, n, config.seed, word="wrong").read(range(n))
    names = atlas.load().names
    there = [(names[i],) for i in batch.extras["concept"].tolist()]
    inputs = [{"pixels": x} for x in _seen(base, batch.image)]
    references = [[f"a picture of a {t}"] for (t,) in there]
    return Task(inputs, there, _names(), references, batch.image, words=list(batch.extras["word"]))


def _prompts(config: Config, base: Base, split: Split, n: int) -> Task:
    """A prompt to rewrite: the score is how well what a candidate draws fits it. For a diffusion base, the name of one
    thing that it was trained on; for the lab's renderer, which draws pairs, a scene's caption."""
    if config.renderer:
        every = captions.drawable(split)
        phrases = ["a picture of a {}", "a drawing of a {}"]
        if n > (most := len(every) * len(phrases)):
            raise ConfigError(f"items={n}: {split} has {len(every)} things that can be drawn; ask for {most} at most.")
        names = [every[i % len(every)] for i in range(n)]
        goals = [phrases[i // len(every)].format(name) for i, name in enumerate(names)]
        return Task([{"goal": g} for g in goals], [(name,) for name in names], _names(), drawn=True,
                    starts=[(g,) for g in goals], goals=goals)  # fmt: skip
    data = scenes(split, n)
    goals = [r[0] for r in data.references]
    return Task([{"goal": g} for g in goals], list(data.things), _names(), data.references,
                starts=[(g,) for g in goals], goals=goals)  # fmt: skip


def _styles(config: Config, base: Base, split: Split, n: int) -> Task:
    """Pairs of scenes: the things of one on the ground of the other, which is seen in a light."""
    data = scenes(split, 2 * n)
    lights = captions.looks(split)
    true = [(g, lights[g][i % len(lights[g])]) for i, g in enumerate(data.grounds[1::2])]
    inputs = [
        {"content": data.images[2 * i], "key": f"{split}/{i}",
         "style": lit(data.images[2 * i + 1], torch.tensor(LIGHTS[light]))}
        for i, (_, light) in enumerate(true)
    ]  # fmt: skip
    return Task(inputs, true, (*GROUNDS, *LIGHTS))


def _singles(split: Split, n: int) -> tuple[Tensor, list[str]]:
    """Pictures of one thing of the 100 classes, and what it is."""
    data = worlds.imagenet(split, 2 * MOST)
    batch = data.read(range(n))
    return batch.image, [data.classes[i] for i in batch.label.tolist()]


def _plus(config: Config, base: Base, split: Split, n: int) -> Task:
    seen = _seen(base, _singles(split, 2 * n)[0])
    inputs = [{"plus": seen[2 * i : 2 * i + 2]} for i in range(n)]
    return Task(inputs, _sums(split, n), _names())


def _sums(split: Split, n: int) -> list[tuple[str, ...]]:
    """What two pictures show that are added; one thing where both show the same."""
    things = _singles(split, 2 * n)[1]
    return [tuple(dict.fromkeys(things[2 * i : 2 * i + 2])) for i in range(n)]


def _minus(config: Config, base: Base, split: Split, n: int) -> Task:
    data = scenes(split, n)
    seen = _seen(base, data.images)
    inputs = [{"plus": [seen[i]], "minus": [f"a picture of a {pair[1]}"]} for i, pair in enumerate(data.things)]
    return Task(inputs, [(pair[0],) for pair in data.things], _names())


def _both(config: Config, base: Base, split: Split, n: int) -> Task:
    (images, heard), true = _sights_and_sounds(split, n)
    inputs = [
        {"both": ({"pixels": x}, {"sound": (y, sounds.RATE)})} for x, y in zip(_seen(base, images), heard, strict=True)
    ]
    return Task(inputs, true, (*_names(), *sounds.NAMES))


def _sights_and_sounds(split: Split, n: int) -> tuple[tuple[Tensor, Tensor], list[tuple[str, ...]]]:
    images, things = _singles(split, n)
    heard = sounds.sounds(split, n, two=False)
    return (images, heard.samples), [(t, *s) for t, s in zip(things, heard.names, strict=True)]
