"""Backdrops: an editor of pictures that is sealed with a search, for style without a diffusion base.

It keeps the things of a scene, puts the backdrop that a text names behind them, and shows the whole in the light that a
text names; a text that names neither changes nothing. Its pictures and lights lie in one safetensors file of the
artifact, so that whoever loads the search has what draws.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patches.families.search.scorers import Renderer
from registry.errors import BadArtifact

FILE = "backdrops.safetensors"
EDGE = 4
"""rows at the top and the bottom whose colours are taken for the background's"""
NEAR = 2.5
"""standard deviations of those colours within which a pixel is background"""
LEAST = 12.0
"""the least such deviation, in grey levels"""
PREFIX = "sealed:"


@dataclass(frozen=True)
class Backdrops(Renderer):
    """An editor: pictures behind things, and lights on all of it, by name."""

    pictures: Mapping[str, Tensor]
    """name -> (3, H, W) uint8"""
    lights: Mapping[str, Tensor]
    """name -> (3,) float32 gains of the three colours"""

    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) uint8: `picture` as every text says. Without a picture, the backdrop alone, or grey."""
        some = next(iter(self.pictures.values()))
        seen = torch.full_like(some, 128) if picture is None else picture
        behind = torch.ones(seen.shape[1:], dtype=torch.bool) if picture is None else background(seen)
        made = []
        for text in texts:
            out = seen
            if (ground := said(text, self.pictures)) is not None:
                out = torch.where(behind, _sized(self.pictures[ground], seen.shape[1:]), seen)
            if (light := said(text, self.lights)) is not None:
                out = lit(out, self.lights[light])
            made.append(out)
        return torch.stack(made)

    def save(self, folder: Path) -> str:
        """Write FILE into an artifact's folder; returns how a configuration names it: sealed:FILE@digest."""
        tensors = {f"picture {k}": v.contiguous() for k, v in self.pictures.items()}
        save_file({**tensors, **{f"light {k}": v.contiguous() for k, v in self.lights.items()}}, folder / FILE)
        return f"{PREFIX}{FILE}@{_digest(folder / FILE)}"


def load(folder: Path, label: str) -> Backdrops:
    """The editor that lies in an artifact's folder. Raises BadArtifact if there is none, or another than `label`."""
    file = folder / FILE
    if not file.is_file() or label != f"{PREFIX}{FILE}@{_digest(file)}":
        raise BadArtifact(f"The configuration draws with {label[:60]}, not the {FILE} that was sealed with it.")
    found: dict[str, dict[str, Tensor]] = {"picture": {}, "light": {}}
    try:
        with safe_open(file, "pt") as f:
            for key in f.keys():  # noqa: SIM118 - it is no dictionary
                kind, _, name = key.partition(" ")
                found[kind][name] = f.get_tensor(key)
    except (SafetensorError, KeyError) as e:
        raise BadArtifact(f"{FILE} cannot be read: {e}") from None
    shapes = {tuple(x.shape[:1]) for x in found["picture"].values()} | {tuple(x.shape) for x in found["light"].values()}
    if not found["picture"] or shapes - {(3,)}:
        raise BadArtifact(f"{FILE} must hold pictures (3, H, W) and lights (3,) by name.")
    return Backdrops(found["picture"], found["light"])


def background(picture: Tensor) -> Tensor:
    """(H, W) bool: pixels of (3, H, W) uint8 whose colours are near those of the upper and the lower edge."""
    edge = torch.cat([picture[:, :EDGE].flatten(1), picture[:, -EDGE:].flatten(1)], 1).float()
    centre, spread = edge.mean(1)[:, None, None], edge.std(1).clamp_min(LEAST)[:, None, None]
    return ((picture.float() - centre).abs() < NEAR * spread).all(0)


def lit(picture: Tensor, gains: Tensor) -> Tensor:
    """(..., 3, H, W) uint8 with every colour times its gain."""
    return (picture.float() * gains[:, None, None]).clamp(0, 255).round().to(torch.uint8)


def said(text: str, names: Mapping[str, Tensor]) -> str | None:
    """The name that a text says last, as whole words; None if it says none."""
    words = f" {' '.join(re.findall(r'[a-z]+', text.lower()))} "
    last, name = max((words.rfind(f" {n} "), n) for n in ("", *names))
    return name if last >= 0 and name else None


def _sized(picture: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(picture.shape[1:]) == tuple(size):
        return picture
    x = F.interpolate(picture[None].float(), tuple(size), mode="bilinear", antialias=True)[0]
    return x.round().clamp(0, 255).to(torch.uint8)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
