"""Pictures that callers send: read safely, embedded in everybody's batch.

They come as base64 or as files of a form, never as paths or addresses. What a picture claims about its size is checked
before a pixel is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from pydantic import BaseModel, Field
from torch import Tensor

from bentos.desk import DEADLINE_S, Strict
from bentos.runtime import Runtime
from patches.families.clip.worker import Picture
from registry.errors import BadRequest, NotReady, TooLarge

MAX_BODY_BYTES = 48 << 20
MAX_IMAGES = 64
"""of one request"""
MAX_BYTES = 12 << 20
"""of one picture's file"""
MAX_PIXELS = 40_000_000
MIN_SIDE = 8
"""pixels; less says nothing"""
MAX_ASPECT = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


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


def read(data: str) -> Pillow.Image:
    """An upright RGB picture. Raises BadRequest saying what is wrong with it, TooLarge if it is beyond a limit."""
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"The picture is not base64 (it begins with {data[:16]!r}).") from None
    if len(raw) > MAX_BYTES:
        raise TooLarge(f"The picture's file has {len(raw)} bytes; {MAX_BYTES} are allowed.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warnings about what is refused below
        try:
            picture: Pillow.Image = Pillow.open(io.BytesIO(raw), formats=FORMATS)
        except Pillow.DecompressionBombError:
            raise TooLarge(f"The picture claims far more than the {MAX_PIXELS} pixels that are allowed.") from None
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            raise BadRequest(f"The picture is none of {', '.join(FORMATS)}, or its header is broken.") from None
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise TooLarge(f"The picture has {width} x {height} pixels; {MAX_PIXELS} together are allowed.")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise BadRequest(
                f"The picture has {width} x {height} pixels; its sides must be at least {MIN_SIDE}, and one at most "
                f"{MAX_ASPECT} times the other."
            )
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise BadRequest(f"The picture is animated ({frames} frames); send one frame.")
        if picture.mode == "CMYK":
            raise BadRequest("The picture is in CMYK, whose colours depend on an ink profile; convert it to RGB.")
        try:
            picture.load()
            picture = ImageOps.exif_transpose(picture)  # cameras store it lying, and say so
        except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError):
            raise BadRequest("The picture is cut off or damaged; its pixels cannot be read.") from None
    return _rgb(picture)


def _rgb(picture: Pillow.Image) -> Pillow.Image:
    """What is transparent shows white."""
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits a channel; Pillow would cut them off at 255
        low, high = (float(v) for v in picture.getextrema())  # type: ignore[arg-type]
        return picture.convert("F").point(lambda v: (v - low) * (255 / max(high - low, 1.0))).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        whole = picture.convert("RGBA")
        return Pillow.alpha_composite(Pillow.new("RGBA", whole.size, "white"), whole).convert("RGB")
    return picture.convert("RGB")


def pixels(runtime: Runtime, data: str) -> Tensor:
    """(3, H, W) of a picture, as the base's processor makes it. Raises as `read`."""
    made: Tensor = runtime.base.processor.image(read(data))[0]
    return made


async def embed(runtime: Runtime, pictures: Sequence[Picture]) -> None:
    """Queue pictures and wait for all. Raises NotReady if that fails or takes too long."""
    if not pictures:
        return
    done, loop = asyncio.Event(), asyncio.get_running_loop()

    def ring(_: Any) -> None:
        if all(p.finished for p in pictures):
            loop.call_soon_threadsafe(done.set)

    for p in pictures:
        p.tag = ring
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
    if any(p.out is None for p in pictures):
        raise NotReady("Embedding failed for this request; it is in the log. Try again.")
