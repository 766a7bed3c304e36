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

Pillow.init()  # it knows AVIF and MPO only afterwards

MAX_BYTES = 12 << 20
"""Bytes that one picture's file may have"""
MAX_PIXELS = 40_000_000
MIN_SIDE = 8
"""pixels; less says nothing"""
MAX_ASPECT = 20
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP")
SIDE_BY_SIDE = frozenset({"MPO"})
"""what Pillow calls a JPEG with more pictures behind the first, as phones and cameras write it: a preview, a depth map,
the other eye, and no animation. The first is the picture"""
OTHERS = (
    (4, b"ftypheic", "HEIC"), (4, b"ftypheix", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftyphevc", "HEIC"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"%PDF", "PDF"), (0, b"<svg", "SVG"), (0, b"<?xml", "SVG or XML"),
    (0, b"8BPS", "Photoshop"), (0, b"<!DOCTYPE", "a web page"), (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a Git LFS pointer"), (0, b"PK", "a zip file"),
)  # fmt: skip
"""offset, bytes there, what it is: files that people send as pictures and that are not read"""
WHITE = str.maketrans("", "", " \t\r\n\f\v")
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
    except Exception:
        raise Invalid("The picture is cut off or damaged; it cannot be read to its end. Save it again.") from None


def unpacked(data: str, what: str = "picture") -> bytes:
    """A file's bytes from base64 as tools write it: wrapped into lines, with or without padding, in the alphabet of
    addresses, after the prefix of a `data:` URI. Raises Invalid naming `what`."""
    body = data
    if data[:5].lower() == "data:":
        about, comma, body = data.partition(",")
        if not comma or not about.lower().rstrip().endswith(";base64"):
            raise Invalid(f"The {what} is a data: URI without ';base64,' ({data[:40]!r}); encode it as base64.")
    text = body.translate(WHITE).rstrip("=").translate(_ADDRESSES)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Invalid(f"The {what} is not base64 (it begins with {data[:16]!r}).") from None


_ADDRESSES = str.maketrans("-_", "+/")


def read(data: str, budget: Budget | None = None) -> Pillow.Image:
    """An upright RGB picture from base64 (`unpacked`).

    budget: of the request it came with. Raises Invalid saying what is wrong with it, TooLarge if it is beyond a limit.
    """
    return opened(unpacked(data), budget)


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
            raise Invalid(
                f"The picture is none of {', '.join(FORMATS)}, or its header is broken{_other(raw)}."
            ) from None
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise TooLarge(f"The picture has {width} x {height} pixels; {MAX_PIXELS} together are allowed.")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
            raise Invalid(
                f"The picture has {width} x {height} pixels; its sides must be at least {MIN_SIDE}, and one at most "
                f"{MAX_ASPECT} times the other."
            )
        if (frames := getattr(picture, "n_frames", 1)) > 1 and picture.format not in SIDE_BY_SIDE:
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


def _other(raw: bytes) -> str:
    """What a file is that cannot be read, if it says so itself."""
    head = raw[:256].lstrip()
    found = next((name for at, mark, name in OTHERS if head[at : at + len(mark)].lower() == mark.lower()), "")
    way = "run git lfs pull where it lies" if "LFS" in found else "save it as PNG or JPEG"
    return f": it looks like {found}; {way}" if found else ""


def eight_bits(picture: Pillow.Image) -> Pillow.Image:
    """Grey of 16 bits as grey of 8, black and white staying what they are; other pictures as they come. Pillow itself
    would cut everything off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda v: v / 257 + 0.5).convert("L")


def _rgb(picture: Pillow.Image) -> Pillow.Image:
    """What is transparent shows white."""
    picture = eight_bits(picture)
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
