"""Whose adapters a population is made of: people drawn by the lab, or folders of pictures with labels.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from registry.errors import ConfigError, NotFound
from training.lab import faces
from training.w2w.config import Config
from training.w2w.population import Contexts, Shots

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class People:
    """n people with M pictures each."""

    labels: Tensor
    """(n, k) in [0, 1]"""
    image: Tensor
    """(n, M, 3, H, W) in [0, 1]"""
    shots: Shots


def attributes(config: Config) -> tuple[str, ...]:
    """Names of the labels' columns."""
    return tuple(sorted(_table(Path(config.data))[1])) if config.data else faces.ATTRIBUTES


def count(config: Config) -> int:
    return len(_table(Path(config.data))[0]) if config.data else config.people + config.val + config.held


def people(config: Config, pipe: Any, which: Sequence[int]) -> People:
    """The people numbered `which`: 0 ... people - 1 span the space, then val, then held. Same number, same person."""
    return _folder(config, pipe, which) if config.data else _drawn(config, pipe, which)


def _drawn(config: Config, pipe: Any, which: Sequence[int]) -> People:
    m = config.shots
    parts = []
    for i in which:
        g = Generator().manual_seed(config.seed * 1_000_003 + i)
        parts.append(faces.pictures(faces.identities(1, g).expand(m, -1), g))
    image = torch.stack([p.image for p in parts])
    unsaid = [torch.zeros(m, dtype=torch.long)] * len(faces.BINARY)
    said = torch.cat([torch.stack([torch.ones_like(p.mouth), p.mouth + 1, p.ground + 1, *unsaid], 1) for p in parts])
    latents = pipe.latents(image.flatten(0, 1)).cpu().unflatten(0, (len(parts), m))
    return People(torch.stack([p.people[0] for p in parts]), image, Shots(latents, prompts(pipe, said)))


def prompts(pipe: Any, said: Tensor) -> Contexts:
    """Conditions of pictures whose prompts are ids (n, 8), mouth and background left unsaid in 30 % each."""

    def contexts(index: Tensor, g: Generator) -> dict[str, Tensor]:
        ids = said[index].clone()
        ids[:, 1:3] *= torch.rand(len(ids), 2, generator=g) < 0.7
        return {"text": pipe.embed(ids).cpu()}

    return contexts


def _table(folder: Path) -> tuple[dict[str, dict[str, float]], set[str]]:
    """labels.json: person -> attribute -> 0 to 1. Raises ConfigError if people are labelled differently."""
    file = folder / "labels.json"
    if not file.is_file():
        raise NotFound(f"{folder} has no labels.json: person -> attribute -> 0 or 1.")
    table = json.loads(file.read_text())
    names = set(next(iter(table.values()), {}))
    for person, row in table.items():
        if set(row) != names:
            raise ConfigError(f"{file}: {person[:40]} is not labelled with the same attributes as the others.")
    return table, names


def labels_of(folder: Path, names: Sequence[str]) -> tuple[tuple[str, ...], Tensor]:
    """(attributes, labels (n, k)) of `names`, from labels.json. Raises ConfigError for a name that is not labelled."""
    table, attributes = _table(folder)
    if missing := [n for n in names if n not in table]:
        raise ConfigError(f"{folder / 'labels.json'} does not label {missing[0][:60]!r}.")
    order = tuple(sorted(attributes))
    return order, torch.tensor([[float(table[n][a]) for a in order] for n in names])


def _folder(config: Config, pipe: Any, which: Sequence[int]) -> People:
    from PIL import Image

    root = Path(config.data)
    names = sorted(_table(root)[0])
    _, labels = labels_of(root, [names[i] for i in which])
    height, width = pipe.size
    images = []
    for i in which:
        files = sorted(p for p in (root / names[i]).glob("*") if p.suffix.lower() in PICTURES)[: config.shots]
        if len(files) < config.shots:
            raise ConfigError(
                f"{root / names[i]} has {len(files)} pictures; shots={config.shots} are asked of each person."
            )
        images.append(torch.stack([_picture(Image.open(f), width, height) for f in files]))
    image = torch.stack(images)
    latents = torch.stack([pipe.latents(x).cpu() for x in image])
    told = pipe.text([config.prompt])[0]

    def contexts(index: Tensor, g: Generator) -> dict[str, Tensor]:
        return {k: v.expand(len(index), *v.shape) for k, v in told.items()}

    return People(labels, image, Shots(latents, contexts))


def _picture(picture: Any, width: int, height: int) -> Tensor:
    from PIL import ImageOps
    from torchvision.transforms.functional import to_tensor

    out: Tensor = to_tensor(ImageOps.fit(picture.convert("RGB"), (width, height)))
    return out
