"""CLIP worker: embeds batches of images on one copy of a CLIP, each image under its own arm.

`Embedder` is a Worker: add jobs, call `step` until `idle`. It belongs to one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patches.engine.isolate import fail, isolate, not_finite
from patches.engine.patch import Applied, Patch
from patches.families.base import Base, load_base
from patches.families.worker import Job, Worker, WorkerSettings
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject

Engine = Callable[[str, Tensor], Tensor]
"""("image", (B, 3, H, W)) or ("text", ids (B, context)) -> unit features (B, k) on the CPU"""


@dataclass(eq=False)
class Picture(Job):
    """One image to be embedded; `Embedder` fills `out`."""

    pixels: Tensor
    """(3, H, W) preprocessed image"""
    out: Tensor | None = field(default=None, init=False)
    """(k,) float32 embedding of unit norm, on the CPU"""


class Embedder(Worker[Picture]):
    """Worker that embeds images of any arms in one forward."""

    def __init__(
        self, base: Base, applied: Applied, slots: int = 32,
        engines: Callable[[str | None, Patch | None], Engine] | None = None,
    ) -> None:  # fmt: skip
        """Create the worker.

        engines: (arm, its patch) -> function that embeds images of that arm at full strength instead of torch, such as
        towers in ONNX Runtime.
        """
        self.base, self.applied, self.slots, self.make_engine = base, applied, slots, engines
        self.engines: dict[str | None, Engine] = {}
        self.prepare(None)
        self.waiting: deque[Picture] = deque()
        self.running: list[Picture] = []

    @property
    def idle(self) -> bool:
        return not self.waiting

    def prepare(self, arm: str | None, patch: Patch | None = None) -> None:
        """Build an arm's engine if engines are used; may take seconds, so call it off the stepping thread."""
        if self.make_engine is not None:
            self.engines = {**{k: v for k, v in self.engines.items() if k is None or k in self.applied.arms},
                            arm: self.make_engine(arm, patch)}  # fmt: skip

    def check(self, pictures: Iterable[Picture]) -> None:
        """Check images before they are added. Raises Invalid for one of another size or with non-finite values."""
        want = (3, *self.base.processor.size)
        for p in pictures:
            if tuple(p.pixels.shape) != want or not bool(p.pixels.isfinite().all()):
                raise Invalid(f"Pixels must be finite numbers of shape {want}, not {tuple(p.pixels.shape)}.")

    def cancel(self, picture: Picture) -> None:
        """Remove an image from the queue."""
        if not picture.finished:
            picture.finished = "cancelled"
            self.waiting.remove(picture)

    @torch.inference_mode()
    def step(self) -> list[Picture]:
        """Embed up to `slots` images in one forward and return them.

        One that makes it raise, or whose features are not finite, fails alone.
        """
        self.running = [self.waiting.popleft() for _ in range(min(self.slots, len(self.waiting)))]
        if not self.running:
            return []
        by_engine: dict[Engine | None, list[Picture]] = {}
        for p in self.running:
            by_engine.setdefault(self.engines.get(p.arm) if p.arm is None or p.strength == 1.0 else None, []).append(p)
        for engine, pictures in by_engine.items():
            isolate(pictures, partial(self._embed, engine), lambda p: p.pixels.numel())
        done, self.running = self.running, []
        return done

    def _embed(self, engine: Engine | None, pictures: Sequence[Picture]) -> None:
        x = torch.stack([p.pixels for p in pictures])
        y = self._torch(x, pictures) if engine is None else engine("image", x)
        for p, out, sound in zip(pictures, y, y.isfinite().all(-1).tolist(), strict=True):
            if sound:
                p.out, p.finished = out, "stop"
            else:
                fail(p, not_finite(p.arm, "features"))

    def _torch(self, x: Tensor, pictures: Sequence[Picture]) -> Tensor:
        x = x.to(self.base.device, self.base.model.visual.proj.dtype)
        with self.applied.rows([p.arm for p in pictures], [p.strength for p in pictures], [p.params for p in pictures]):
            y: Tensor = self.base.model(image=x)["image_features"]
        return y.float().cpu()

    def reset(self) -> None:
        """Drop all queued images; engines stay."""
        self.waiting.clear()
        self.running = []

    def probe(self, arm: str | None) -> Picture:
        """Return an image that any model can embed, for health checks."""
        return Picture(_pattern(self.base), arm=arm)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Embed a fixed image under an arm: features (1, k), bit for bit equal for equal behaviour.

        Raises Failed if they are not finite.
        """
        x = _pattern(self.base)[None].to(self.base.device, self.base.model.visual.proj.dtype)
        with self.applied.rows([arm], [strength]):
            out: Tensor = self.base.model(image=x)["image_features"]
        if not bool(out.isfinite().all()):
            raise not_finite(arm, "features")
        return out


def made(subject: Subject, settings: WorkerSettings) -> Embedder:
    """Create the worker of a CLIP subject; with a provider, arms at full strength run in ONNX Runtime."""

    def engine(arm: str | None, patch: Patch | None) -> Engine:
        from patches.families.clip.towers import prepared

        fresh = load_base(subject.base.ref, subject.base.family)  # a copy without hooks
        return prepared(fresh, settings.provider, patch, digest=arm or "")

    return Embedder(subject.base, subject.applied, settings.slots, engine if settings.provider else None)


def _pattern(base: Base) -> Tensor:
    """Return an image (3, H, W) of stripes and a gradient, in which no two patches are equal."""
    h, w = base.processor.size
    y, x = torch.linspace(-2, 2, h)[:, None], torch.linspace(-2, 2, w)
    return torch.stack([y + 0 * x, (9 * x).sin() + 0 * y, (5 * x * y).cos()])
