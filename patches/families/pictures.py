"""Reading pictures that others made, safely: what a file claims about its size is checked before a pixel is decoded."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError

from registry.errors import Invalid, PatchbayError, TooLarge

MAX_BYTES = 12 << 20
"""Bytes that one picture's file may have"""
MAX_PIXELS = 40_000_000
MIN_SIDE = 8
"""pixels; less says nothing"""
MAX_ASPECT = 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DRAFT_PIXELS, DRAFT_SIDE = 4_000_000, 1024
"""a JPEG of more pixels is decoded at a half, a quarter or an eighth, its shorter side still at least this"""


@dataclass
class Budget:
    """Pixels that one request may still have decoded: files of a kilobyte may claim 40 million each."""

    left: int = 64_000_000

    def take(self, pixels: int) -> None:
        """Raises TooLarge, taking nothing, if there are not so many left."""
        if pixels > self.left:
            raise TooLarge(
                f"The picture has {pixels} pixels, and the request may have {self.left} more decoded. Send it alone, "
                "or smaller."
            )
        self.left -= pixels


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Whatever a damaged picture makes a decoder raise, it is that picture's fault: Invalid."""
    try:
        yield
    except PatchbayError:
        raise
    except Pillow.DecompressionBombError:
        raise TooLarge(f"The picture claims far more than the {MAX_PIXELS} pixels that are allowed.") from None
    except Exception as e:
        raise Invalid(f"The picture is cut off or damaged; it cannot be read ({type(e).__name__}).") from None


def read(data: str, budget: Budget | None = None) -> Pillow.Image:
    """An upright RGB picture from base64 (the prefix of a `data:` URI is left out).

    budget: of the request it came with. Raises Invalid saying what is wrong with it, TooLarge if it is beyond a limit.
    """
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"The picture is not base64 (it begins with {data[:16]!r}).") from None
    return opened(raw, budget)


def opened(raw: bytes, budget: Budget | None = None) -> Pillow.Image:
    """An upright RGB picture from a file's bytes. Raises as `read`."""
    with guarded():
        return _opened(raw, budget or Budget())


def _opened(raw: bytes, budget: Budget) -> Pillow.Image:
    if len(raw) > MAX_BYTES:
        raise TooLarge(f"The picture's file has {len(raw)} bytes; {MAX_BYTES} are allowed.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warnings about what is refused below
        try:
            picture: Pillow.Image = Pillow.open(io.BytesIO(raw), formats=FORMATS)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
            raise Invalid(f"The picture is none of {', '.join(FORMATS)}, or its header is broken.") from None
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise TooLarge(f"The picture has {width} x {height} pixels; {MAX_PIXELS} together are allowed.")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise Invalid(
                f"The picture has {width} x {height} pixels; its sides must be at least {MIN_SIDE}, and one at most "
                f"{MAX_ASPECT} times the other."
            )
        if (frames := getattr(picture, "n_frames", 1)) > 1:
            raise Invalid(f"The picture is animated ({frames} frames); send one frame.")
        if picture.mode == "CMYK":
            raise Invalid("The picture is in CMYK, whose colours depend on an ink profile; convert it to RGB.")
        budget.take(width * height)
        if width * height > DRAFT_PIXELS:
            scale = DRAFT_SIDE / min(width, height)
            picture.draft("RGB", (int(width * scale), int(height * scale)))
        picture.load()
        picture = ImageOps.exif_transpose(picture)  # cameras store it lying, and say so
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


def png(image: Any) -> str:
    """A picture (3, H, W) uint8, or a Pillow image, as a PNG data URL."""
    if not isinstance(image, Pillow.Image):
        from torchvision.transforms.functional import to_pil_image

        image = to_pil_image(image)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
