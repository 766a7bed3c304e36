"""A diffusion base as what draws: prompts become pictures, and a picture is changed as a prompt says.

A search that rewrites prompts looks at what its candidates draw (`Preference`, `Style`). Every candidate starts from
the same noise, and drawing is cut into denoiser steps of few rows, so that a cancel is obeyed within a second.
"""

from __future__ import annotations

from collections.abc import Generator as Slices
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.engine.patch import ONLY, Patch
from patches.families.base import Base
from patches.families.search.scorers import Renderer
from patches.families.worker import WorkerSettings

GUIDANCE = 3.0
SLOTS = 4
"""rows of one denoiser step"""
CHANGED = 0.6
"""how much of a picture that is changed is noised away (SDEdit, arXiv 2108.01073)"""
MAX_KEPT = 4096
"""pictures drawn from a text alone that are kept, 12 kB each at 64 px: arms and judges ask for the same ones"""


class Diffusion(Renderer):
    """Text to picture, and picture to picture, by a diffusion base, also a patched one."""

    def __init__(self, base: Base, patch: Patch | None = None, steps: int = 10, seed: int = 0) -> None:
        from patches.subject import Subject

        self.base, self.steps, self.seed = base, steps, seed
        self.kept: dict[str, Tensor] = {}
        subject = Subject({"base": base}, {} if patch is None else {ONLY: patch})
        self.arm = None if patch is None else ONLY
        self.worker = subject.family.worker(subject, WorkerSettings(slots=SLOTS))

    def draw(self, texts: Sequence[str], picture: Tensor | None = None) -> Tensor:
        """(n, 3, H, W) uint8 of the base's own size."""
        slices = self.drawing(texts, picture)
        while True:
            try:
                next(slices)
            except StopIteration as done:
                made: Tensor = done.value
                return made

    def drawing(self, texts: Sequence[str], picture: Tensor | None = None) -> Slices[None, None, Tensor]:
        """Yields after every denoiser step. Raises what a row failed with; leaves nothing queued."""
        if picture is not None:
            return (yield from self._drawing(texts, picture))
        made = {t: self.kept[t] for t in texts if t in self.kept}
        new = [t for t in dict.fromkeys(texts) if t not in made]
        if new:
            drawn = yield from self._drawing(new, None)
            made |= dict(zip(new, drawn, strict=True))
            self.kept |= made
            while len(self.kept) > MAX_KEPT:
                self.kept.pop(next(iter(self.kept)))
        return torch.stack([made[t] for t in texts])

    def _drawing(self, texts: Sequence[str], picture: Tensor | None) -> Slices[None, None, Tensor]:
        from patches.families.diffusion import Denoising, drawn

        pipe = self.base.model
        rows: list[Denoising] = []
        about: dict[str, Any] = {"guidance": GUIDANCE, "steps": self.steps, "seed": self.seed, "arm": self.arm}
        if picture is not None:
            x = F.interpolate(picture[None].float() / 255, pipe.size, mode="bilinear", antialias=True)
            about |= {"start": pipe.latents(x.clamp(0, 1))[0].cpu(), "strength_of_edit": CHANGED}
        try:
            for text in texts:
                rows.append(drawn(pipe, text, **about))
                yield
            self.worker.check(rows)
            self.worker.add(rows)
            while not self.worker.idle:
                self.worker.step()
                yield
        finally:
            self.worker.reset()
        made = []
        for row in rows:
            if row.error is not None:
                raise row.error
            assert row.picture is not None
            made.append((255 * row.picture).round().to(torch.uint8))
        return torch.stack(made)
