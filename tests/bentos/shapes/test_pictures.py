"""What callers may send as a picture, and what each bad one is told."""

import base64
import io
import re
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


WRITTEN = {
    "as it is": lambda text: text,
    "a data URI": lambda text: "data:image/png;base64," + text,
    "a data URI with a space": lambda text: "data:image/png;base64, " + text,
    "a data URI with parameters": lambda text: "DATA:image/png;charset=utf-8;BASE64," + text,
    "a newline at the end (base64, echo)": lambda text: text + "\n",
    "lines of 76 (openssl, MIME)": lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    "lines of 64 (PEM), indented": lambda text: "".join(f"    {text[i : i + 64]}\n" for i in range(0, len(text), 64)),
    "without padding (JWT, Go's Raw)": lambda text: text.rstrip("="),
    "of addresses (urlsafe)": lambda text: text.replace("+", "-").replace("/", "_"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_base64_is_read_as_tools_write_it(how):
    for extra in range(3):  # every length of padding
        whole = some(24 + extra, 16)
        assert np.array_equal(np.array(read(WRITTEN[how](coded(whole)))), np.array(whole))


def test_every_file_in_base64_is_read_so():
    from bentos.shapes.films import unpacked
    from patches.families.video.predict import _bytes

    for how in WRITTEN.values():
        assert unpacked(how(base64.b64encode(b"a clip?>").decode())) == b"a clip?>"
        assert _bytes(how(base64.b64encode(b"a clip?>").decode())) == b"a clip?>"
    with pytest.raises(Invalid, match="clip is not base64"):
        unpacked("a clip!")


def test_an_avif_is_read():
    got = np.array(read(coded(some(48, 48), "AVIF", quality=100, subsampling="4:4:4"))).astype(int)
    assert np.abs(got - np.array(some(48, 48))).mean() < 4


@pytest.mark.parametrize("second", [(24, 16), (6, 4)], ids=["the other eye", "a preview"])
def test_a_phones_jpeg_with_more_pictures_behind_the_first_is_the_first(second):
    whole = some(48, 32)
    got = read(coded(whole, "MPO", save_all=True, append_images=[some(*second).rotate(90)], quality=95))
    assert got.size == (48, 32)
    assert np.array(got).shape == np.array(whole).shape
    alone = read(coded(whole, "JPEG", quality=95))
    assert np.array_equal(np.array(got), np.array(alone))


def test_a_camera_that_lay_on_its_side_is_turned_upright():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert read(coded(some(24, 16), "PNG", exif=exif)).size == (16, 24)


def test_what_is_transparent_shows_white():
    clear = Pillow.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert np.array(read(coded(clear))).min() == 255


@pytest.mark.parametrize(("darkest", "lightest"), [(0, 65_535), (0, 60_000), (20_000, 24_000), (65_535, 65_535)])
def test_sixteen_bits_a_channel_keep_their_range(darkest, lightest):
    """Black stays black and a dim picture dim: nothing is stretched, nothing cut off."""
    values = np.linspace(darkest, lightest, 16 * 16).reshape(16, 16).astype(np.uint16)
    got = np.array(read(coded(Pillow.fromarray(values))))[..., 0].astype(int)
    assert np.abs(got - values / 257).max() <= 1


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
    "not base64 data": ("data:image/svg+xml,%3Csvg%3E", Invalid, "without ';base64,'"),
    "a phone's format": (
        base64.b64encode(b"\0\0\0\x18ftypheic\0\0\0\0").decode(),
        Invalid,
        "looks like HEIC; save it as PNG",
    ),
    "a scan": (base64.b64encode(b"II*\0\x08\0\0\0").decode(), Invalid, "looks like TIFF"),
    "a pointer": (
        base64.b64encode(b"version https://git-lfs.github.com/spec/v1").decode(),
        Invalid,
        "Git LFS pointer; run git lfs pull",
    ),
    "an animated AVIF": (coded(some(), "AVIF", save_all=True, append_images=[some().rotate(180)]), Invalid, "2 frames"),
    "a vector": (base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode(), Invalid, "none of PNG"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_picture_is_told_why(what):
    data, error, says = REFUSED[what]
    with pytest.raises(error, match=says):
        read(data)


def test_refusals_are_in_our_words():
    """No name of an exception, no word of a library."""
    for what, (data, error, _) in REFUSED.items():
        with pytest.raises(error) as told:
            read(data)
        assert not re.search(r"\w+Error|Image\.|<_io|0x[0-9a-f]+|PIL|Traceback", str(told.value)), what
        assert str(told.value).endswith("."), what


def test_the_limit_is_on_pixels_before_any_is_decoded():
    side = int(MAX_PIXELS**0.5) + 1
    for claimed in (side, 50_000):
        with pytest.raises(TooLarge, match=str(MAX_PIXELS)):
            read(bomb(claimed))
