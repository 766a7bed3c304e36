"""Pictures that callers send: read safely, embedded in everybody's batch.

They come as base64 or as files of a form, never as paths or addresses. What a picture claims about its size is checked
before a pixel is decoded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import Tensor

from bentos.desk import DEADLINE_S, Strict
from bentos.runtime import Runtime
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
    if not pictures:
        return
    done, loop = asyncio.Event(), asyncio.get_running_loop()

    def ring(_: Any) -> None:
        if all(p.finished for p in pictures):
            with contextlib.suppress(RuntimeError):  # after a disconnect the loop may be gone; then nobody waits
                loop.call_soon_threadsafe(done.set)

    for p in pictures:
        p.on_step = ring
    runtime.submit(pictures)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await done.wait()
    except TimeoutError:
        raise NotReady(f"No answer within {DEADLINE_S:g} s; it was given up.") from None
    finally:
        for p in pictures:
            if not p.finished:
                runtime.cancel(p)
    if all(p.out is None for p in pictures):
        raise pictures[0].error or NotReady("Embedding failed for this request; it is in the log. Try again.")
