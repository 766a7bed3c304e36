"""Pictures that callers send: read safely, embedded in everybody's batch.

They come as base64 or as files of a form, never as paths or addresses. What a picture claims about its size is checked
before a pixel is decoded.
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
"""Pictures that one request may hold"""


class Image(BaseModel):
    """A picture as base64 (a `data:` URI's prefix is left out), and who is to look at it."""

    model_config = Strict
    data: Annotated[str, Field(min_length=1, max_length=MAX_BYTES * 4 // 3 + 128)]
    model: Annotated[str, Field(max_length=200)] | None = None
    """this picture's arm; by default the request's"""


Images = Annotated[
    list[Any],
    Field(min_length=1, max_length=MAX_IMAGES, json_schema_extra={"items": Image.model_json_schema()}),
]
"""each is judged for itself, so that a bad one costs its neighbours nothing"""


def pixels(runtime: Runtime, data: str, budget: Budget | None = None) -> Tensor:
    """(3, H, W) of a picture, as the base's processor makes it. Raises as `read`."""
    with guarded():
        made: Tensor = runtime.base.processor.image(read(data, budget))[0]
        return made


async def embed(runtime: Runtime, pictures: Sequence[Picture]) -> None:
    """Queue pictures and wait for all; one that failed says so in its `error`. Raises NotReady if it takes too long,
    and the error of the first if all failed."""
    await waiting.finished(runtime, pictures)
    if pictures and all(p.out is None for p in pictures):
        raise pictures[0].error or NotReady("Embedding failed for this request; it is in the log. Try again.")
