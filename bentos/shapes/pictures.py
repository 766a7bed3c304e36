"""Images in requests: decode them safely, and embed them in the shared batch.

They come as base64 or as files of a form, never as paths or URLs. The size an image claims is checked before any pixel
is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import Tensor

from bentos.desk import Strict
from bentos.runtime import Runtime
from bentos.shapes import waiting
from patches.families.clip.worker import Picture
from patches.families.pictures import MAX_BYTES, Budget, guarded, read
from registry.errors import NotReady

MAX_BODY_BYTES = 48 << 20
MAX_IMAGES = 64
"""Largest number of images in one request"""


class Image(BaseModel):
    """An image as base64 (a `data:` URI's prefix is dropped), optionally with its own arm."""

    model_config = Strict
    data: Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)]
    model: Annotated[str, Field(max_length=200)] | None = None
    """Arm for this image; by default the request's"""


Images = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_IMAGES, json_schema_extra={"items": Image.model_json_schema()}),
]
"""List of images, each validated on its own, so that a bad one does not affect the others"""


def pixels(runtime: Runtime, data: str, budget: Budget | None = None) -> Tensor:
    """Decode and preprocess an image: (3, H, W). Raises as `read`."""
    with guarded():
        made: Tensor = runtime.base.processor.image(read(data, budget))[0]
        return made


async def embed(runtime: Runtime, pictures: Sequence[Picture]) -> None:
    """Queue images and wait for all; a failed one has its `error` set.

    Raises NotReady after the deadline, and the first image's error if all failed.
    """
    await waiting.finished(runtime, pictures)
    if pictures and all(p.out is None for p in pictures):
        raise pictures[0].error or NotReady("Embedding failed for this request; it is in the log. Try again.")
