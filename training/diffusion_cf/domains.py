"""Domains: two classes of pictures that differ subtly, split so that no drawing of test was seen in train.

Six of the lab, whose classes lie near each other in the conditioning space (cosine of their means .75 or more), and
any folder of a user's own pictures. In the lab the split is by style: hands that drew train's sprites drew none of
val or test. A picture is a sprite on a plain ground, its size, place, side and light drawn at random, so pictures of
one sprite are not independent: `sprite` says which one it is, and intervals are taken over sprites.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from registry.errors import ConfigError, NotFound
from training.lab import atlas
from training.lab.worlds import STYLES

LAB: dict[str, tuple[str, str]] = {
    "reptiles": ("crocodile", "lizard"),
    "rodents": ("rat", "mouse"),
    "cats": ("leopard", "tiger"),
    "strings": ("violin", "guitar"),
    "citrus": ("lemon", "tangerine"),
    "elders": ("old man", "old woman"),
}
"""domain -> its two classes, by the atlas's names"""
SIZE = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHARES = {"train": 0.6, "val": 0.8, "test": 1.0}
"""Splits of a folder that has none: a picture belongs to the first whose share its name's hash lies below"""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of some classes."""

    x: Tensor
    """(n, 3, H, W) in 0..1"""
    label: Tensor
    """(n,) index into `classes`"""
    sprite: Tensor
    """(n,) which drawing or file a picture is made of"""
    classes: tuple[str, ...]
    domains: tuple[str, ...]
    """Domain of each class"""

    def __len__(self) -> int:
        return len(self.x)

    def take(self, at: Tensor) -> Pictures:
        """The pictures at these places."""
        return Pictures(self.x[at], self.label[at], self.sprite[at], self.classes, self.domains)

    def partner(self) -> Tensor:
        """(n,) the class each picture is to become: the next one of its domain."""
        after = []
        for i, domain in enumerate(self.domains):
            mine = [j for j, d in enumerate(self.domains) if d == domain]
            after.append(mine[(mine.index(i) + 1) % len(mine)])
        return torch.tensor(after)[self.label]


def lab(split: str, per_class: int, seed: int = 0, domains: tuple[str, ...] = tuple(LAB)) -> Pictures:
    """Pictures of lab domains. split: train, val, test, or held (the style no lab model was trained on)."""
    if split not in STYLES:
        raise NotFound(f"There is no split {split[:20]!r}. Splits: {', '.join(STYLES)}.")
    if unknown := [d for d in domains if d not in LAB]:
        raise NotFound(f"There is no domain {unknown[0][:40]!r}. Domains of the lab: {', '.join(LAB)}.")
    sprites, names, of = atlas.load(), [], []
    for domain in domains:
        names += list(LAB[domain])
        of += [domain] * 2
    g = torch.Generator().manual_seed(1000 * seed + list(STYLES).index(split))
    picked, label = [], []
    for i, name in enumerate(names):
        own = sprites.pick([sprites.find(name)], STYLES[split])
        if not len(own):
            continue  # the held-out style has not drawn everything
        picked += own[torch.arange(per_class) % len(own)].tolist()
        label += [i] * per_class
    at = torch.tensor(picked)
    return Pictures(draw(sprites.sprites[at], g), torch.tensor(label), at, tuple(names), tuple(of))


def draw(sprites: Tensor, g: torch.Generator) -> Tensor:
    """(n, 3, 64, 64) in 0..1: each sprite (n, 4, 64, 64) uint8 at .85-.98 of its size, somewhere, maybe mirrored, on
    a light or grey plain ground: the mixture the lab's diffusion model was trained on."""
    n = len(sprites)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *(shape or (1,)), generator=g)

    s = sprites.float() / 255
    grey = s[:, :3].mean(1, keepdim=True)
    colour = ((s[:, :3] - grey) * uniform(0.9, 1.1, 1, 1, 1) + grey) * uniform(0.95, 1.05, 1, 1, 1)
    s = torch.cat([colour.clamp(0, 1) * s[:, 3:], s[:, 3:]], 1)
    scale = uniform(0.85, 0.98)
    side = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = (side / scale)[:, 0], (1 / scale)[:, 0]
    theta[:, :, 2] = uniform(-1, 1, 2) * (1 - scale) / scale
    s = F.grid_sample(s, F.affine_grid(theta, list(s.shape), align_corners=False), align_corners=False)
    light = 0.75 + 0.25 * torch.rand(n, 3, 1, 1, generator=g)
    white = torch.rand(n, 1, 1, 1, generator=g) < 0.4
    ground = torch.where(white, torch.ones(()), light)
    return (s[:, :3] + ground * (1 - s[:, 3:])).clamp(0, 1)


def folder(root: Path, split: str, size: tuple[int, int], per_class: int = 0) -> Pictures:
    """Pictures of a user's own domain: root/<split>/<class>/*.png, or root/<class>/*.png split by the hash of the name.

    Two folders of classes at least; JPEG, WebP and BMP are read too. Raises NotFound for a folder without pictures.
    """
    from PIL import Image

    from patches.families.diffusion import Processor

    if not root.is_dir():
        raise NotFound(f"There is no folder {root}. Give data=path/to/folder with one folder of pictures a class.")
    split_by_folder = (root / split).is_dir()
    top = root / split if split_by_folder else root
    classes = tuple(sorted(p.name for p in top.iterdir() if p.is_dir() and p.name not in SHARES))
    if len(classes) < 2:
        raise ConfigError(f"{top} has {len(classes)} folders of classes; a domain needs two.")
    read, x, label, which = Processor(size), [], [], []
    for i, name in enumerate(classes):
        files = sorted(p for p in (top / name).iterdir() if p.suffix.lower() in SUFFIXES and not p.is_symlink())
        files = [p for p in files if split_by_folder or split_of(p.name) == split][: per_class or None]
        if not files:
            raise NotFound(f"{top / name} has no pictures for {split} ({', '.join(SUFFIXES)}).")
        for p in files:
            with Image.open(p) as picture:
                x.append(read.image(picture))
            label.append(i)
            which.append(int(hashlib.sha256(f"{name}/{p.name}".encode()).hexdigest()[:12], 16))
    return Pictures(torch.stack(x), torch.tensor(label), torch.tensor(which), classes, (root.name,) * len(classes))


def split_of(name: str) -> str:
    """train, val or test, by the hash of a file's name: 60, 20 and 20 of 100."""
    at = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
    return next(split for split, share in SHARES.items() if at < share)
