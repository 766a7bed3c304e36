"""What callers may send as a picture, and what each bad one is told."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow

from patches.families.pictures import MAX_PIXELS, read
from registry.errors import Invalid, TooLarge


def coded(picture, kind="PNG", **how):
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return base64.b64encode(file.getvalue()).decode()


def some(width=24, height=16, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Pillow.fromarray(noise).convert(mode)


def bomb(side):
    """A few bytes of PNG that claim side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    raw = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )
    return base64.b64encode(raw).decode()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
def test_a_picture_is_read_as_it_is(kind):
    whole = some() if kind != "GIF" else some().quantize(200)
    got = read(coded(whole, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert got.mode == "RGB"
    assert np.array_equal(np.array(got), np.array(whole.convert("RGB")))


def test_the_prefix_of_a_data_uri_is_left_out():
    assert np.array_equal(np.array(read("data:image/png;base64," + coded(some()))), np.array(some()))


def test_a_camera_that_lay_on_its_side_is_turned_upright():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read(coded(some(24, 16), "PNG", exif=exif)).size == (16, 24)


def test_what_is_transparent_shows_white():
    clear = Pillow.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert np.array(read(coded(clear))).min() == 255


def test_sixteen_bits_a_channel_keep_their_shades():
    ramp = Pillow.fromarray(np.linspace(0, 60_000, 16 * 16).reshape(16, 16).astype(np.uint16))
    got = np.array(read(coded(ramp)))[..., 0]
    assert len(np.unique(got)) > 200


REFUSED = {
    "no base64": ("not a picture!", Invalid, "not base64"),
    "no picture": (base64.b64encode(b"hello there").decode(), Invalid, "none of PNG"),
    "cut off": (base64.b64encode(base64.b64decode(coded(some(64, 64)))[:-400]).decode(), Invalid, "cut off"),
    "only a header": (base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), Invalid, "header is broken"),
    "a bomb": (bomb(50_000), TooLarge, "pixels"),
    "one pixel": (coded(some(1, 1)), Invalid, "1 x 1"),
    "a stripe": (coded(some(400, 8)), Invalid, "400 x 8"),
    "CMYK": (coded(some(mode="CMYK"), "JPEG"), Invalid, "CMYK"),
    "animated": (coded(some(), "GIF", save_all=True, append_images=[some().rotate(90)]), Invalid, "2 frames"),
    "a vector": (base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode(), Invalid, "none of PNG"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_picture_is_told_why(what):
    data, error, says = REFUSED[what]
    with pytest.raises(error, match=says):
        read(data)


def test_the_limit_is_on_pixels_before_any_is_decoded():
    side = int(MAX_PIXELS**0.5) + 1
    for claimed in (side, 50_000):
        with pytest.raises(TooLarge, match=str(MAX_PIXELS)):
            read(bomb(claimed))
