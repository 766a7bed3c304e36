"""Rows of a diffusion model for a request: prepared, queued, waited for, and their pictures packed."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image as Pillow
from torch import Tensor

from bentos.runtime import Runtime
from patches.engine.patch import Patch
from patches.families.diffusion import Denoising
from patches.families.pictures import guarded, read
from registry.errors import PatchbayError, TooLarge

MAX_ROWS = 32
"""Rows that one request may ask for"""
MAX_STEPS, MAX_LEVELS = 200, 100
MAX_SIDE = 1024
"""pixels of a picture that is made"""
GAP = 4
"""pixels between the pictures of a strip"""


def patch_of(runtime: Runtime, arm: str | None) -> Patch | None:
    """The patch of an arm; None for the base."""
    found = runtime.subject.arms.get(arm) if arm is not None else None
    return found if isinstance(found, Patch) else None


def picture_of(runtime: Runtime, data: str) -> Tensor:
    """(3, H, W) in 0..1 of a caller's picture, at the base's own size. Raises Invalid saying what is wrong with it."""
    with guarded():
        made: Tensor = runtime.base.processor.image(read(data))
        return made


def size_of(text: str | None) -> tuple[int, int] | None:
    """(H, W) of OpenAI's `WIDTHxHEIGHT`; None for the model's own. Raises TooLarge beyond the cap."""
    if text is None or text == "auto":
        return None
    width, _, height = text.partition("x")
    if max(int(width), int(height)) > MAX_SIDE:
        raise TooLarge(f"size {text[:20]}: {MAX_SIDE} pixels a side are the most.")
    return int(height), int(width)


async def told(runtime: Runtime, work: Callable[[], Any]) -> Any:
    """What the base's encoders say, on the thread that owns the base."""
    return await asyncio.to_thread(runtime.call, work)


def progress(rows: Sequence[Denoising]) -> float:
    """0 to 1: how many of all rows' stages are done."""
    total = sum(max(row.stages, row.stage, 1) for row in rows)
    return sum(max(row.stages, 1) if row.finished else row.stage for row in rows) / max(total, 1)


def png(picture: Pillow.Image) -> bytes:
    """The PNG of a PIL image."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def coded(runtime: Runtime, picture: Tensor) -> str:
    """A picture (3, H, W) in 0..1 as PNG in base64."""
    return base64.b64encode(png(runtime.base.processor.picture(picture))).decode()


def strip(runtime: Runtime, pictures: Sequence[Tensor]) -> bytes:
    """The PNG of pictures (3, H, W) side by side."""
    cells = [runtime.base.processor.picture(p) for p in pictures]
    width, height = cells[0].size
    out = Pillow.new("RGB", ((width + GAP) * len(cells) - GAP, height), "white")
    for i, cell in enumerate(cells):
        out.paste(cell, (i * (width + GAP), 0))
    return png(out)


def first_error(rows: Sequence[Denoising]) -> PatchbayError | None:
    """What the first row that failed failed with, if all of them did."""
    errors = [row.error for row in rows]
    return errors[0] if errors and all(e is not None for e in errors) else None
