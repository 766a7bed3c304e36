"""Clips as people send them: true files decode, bad ones are refused with the reason, and nothing dies."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patches.families.video import decode
from patches.families.video.decode import Decoded, Limits, cropped, fit, read, sample
from registry.errors import Invalid, NotReady, TooLarge
from training.data.video import FILES

av = pytest.importorskip("av")


def film(
    count: int = 12, size: int = 48, rate: int = 25, container: str = "mp4", codec: str = "mpeg4", times=None
) -> bytes:
    """A square that moves one pixel a frame on grey; times: a time stamp for each frame, in ticks of 1/1000 s."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        if times is not None:
            from fractions import Fraction

            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(count):
            pixels = np.full((size, size, 3), 90, np.uint8)
            pixels[8:20, 4 + t : 16 + t] = (220, 40, 40)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], stream.codec_context.time_base
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return out.getvalue()


def unframed() -> bytes:
    """An AVI with a video stream whose chunks of frames were cut out: header and index alone."""
    raw = film(12, container="avi")
    return raw[: raw.index(b"movi") + 4]


def sound() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            file.mux(packet)
    return out.getvalue()


def zipped(names: list[str], size: int = 32) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as held:
        for i, name in enumerate(names):
            picture = io.BytesIO()
            Image.new("RGB", (size, size), (i * 20 % 255, 0, 0)).save(picture, "PNG")
            held.writestr(name, picture.getvalue())
    return out.getvalue()


def gif(count: int = 6, size: int = 24) -> bytes:
    frames = [Image.new("RGB", (size, size), (40 * i, 255 - 40 * i, 0)) for i in range(count)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=50)
    return out.getvalue()


def animated(order: str, kind: str) -> bytes:
    """Frames of two colours, each shown for 160 ms, as Pillow writes them."""
    frames = [Image.new("RGB", (24, 24), {"a": (200, 10, 10), "b": (10, 10, 200)}[c]) for c in order]
    out, exact = io.BytesIO(), {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=160, loop=0, **exact)
    return out.getvalue()


def test_a_film_is_counted_by_decoding_and_its_square_moves() -> None:
    clip = read(film(12))
    assert tuple(clip.frames.shape) == (12, 3, 48, 48)
    assert clip.times[-1] == pytest.approx(11 / 25, abs=1e-3)
    red = clip.frames[:, 0].float() - clip.frames[:, 1].float()
    where = [(r > 80).nonzero()[:, 1].float().mean() for r in red]
    assert where[11] - where[0] == pytest.approx(11, abs=1)


def test_gifs_and_zip_files_are_clips_too() -> None:
    assert len(read(gif(6)).frames) == 6
    assert len(read(zipped([f"{i:03d}.png" for i in range(5)])).frames) == 5


def test_large_frames_are_shrunk_while_they_are_decoded() -> None:
    clip = read(film(4, size=320), Limits(side=64))
    assert tuple(clip.frames.shape) == (4, 3, 64, 64)
    assert clip.size == (320, 320)


def test_variable_rates_are_sampled_by_time() -> None:
    clip = read(film(8, times=[0, 10, 20, 30, 40, 500, 900, 1000], container="matroska"))
    assert float(clip.times[-1]) == pytest.approx(1.0, abs=0.02)
    _, at = sample(clip, 3)
    assert at == [0, 5, 7]  # half of the time, not half of the frames


def test_sampling_refuses_what_is_too_short() -> None:
    clip = Decoded(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5) / 25, (8, 8))
    assert sample(clip, 5)[1] == [0, 1, 2, 3, 4]
    with pytest.raises(Invalid, match=r"5 frames .* needs 8"):
        fit(clip, 8, 8)
    with pytest.raises(Invalid, match="needs 9"):
        fit(clip, 3, 8, stride=4)


@pytest.mark.parametrize(
    ("kind", "order", "at"),
    [
        ("WEBP", "ab" * 3 + "b" * 10, [0, 1, 2, 3, 4] + [5] * 11),
        ("WEBP", "a" * 8 + "b" * 8, [0] * 8 + [1] * 8),
        ("PNG", "aabbbbbb", [0] * 2 + [1] * 6),
        ("GIF", "a" * 8, [0] * 8),
    ],
)
def test_equal_frames_that_a_file_keeps_as_one_are_counted_by_time(kind: str, order: str, at: list[int]) -> None:
    clip = read(animated(order, kind))
    assert len(clip.frames) < len(order)
    frames, numbers = sample(clip, len(order))
    assert numbers == at
    colours = {"a": (200, 10, 10), "b": (10, 10, 200)}
    for frame, letter in zip(frames, order, strict=True):
        assert (frame[:, 0, 0] - torch.tensor(colours[letter])).abs().max() <= 1
    with pytest.raises(Invalid, match="needs"):  # 16 frames a step are no question of how long one is shown
        sample(clip, len(order), stride=2)
    with pytest.raises(Invalid, match="needs 999"):
        sample(clip, 999)


def test_a_still_film_in_one_picture_is_told_how_to_be_sent() -> None:
    with pytest.raises(Invalid, match=r"1 frames .* zip file"):
        sample(read(animated("aaaa", "WEBP")), 4)  # libwebp keeps neither the frames nor how long they are shown


def test_cropping_keeps_the_middle() -> None:
    frames = torch.zeros(1, 3, 10, 20, dtype=torch.uint8)
    frames[..., 5:15] = 200
    assert int(cropped(frames, 10).min()) == 200


def claimed(seconds: int) -> bytes:
    """An AVI of twelve frames whose stream header says it lasts so long."""
    out = bytearray(film(12, container="avi"))
    at = out.index(b"strh")
    scale, rate = struct.unpack("<II", out[at + 28 : at + 36])
    out[at + 40 : at + 44] = struct.pack("<I", seconds * rate // scale)
    return bytes(out)


BAD = {
    "empty": (lambda: b"", Invalid, "empty"),
    "text": (lambda: b"hello, I am a film" * 20, Invalid, "no video"),
    "cut off": (lambda: film()[:400], Invalid, "cut off|no video|no frames"),
    "no frames": (unframed, Invalid, "no video|no frames"),
    "audio only": (sound, Invalid, "no video stream"),
    "a 10-hour header": (lambda: claimed(36_000), TooLarge, "3[56][0-9]{3} s"),
    "8K": (lambda: zipped(["a.png", "b.png"], 8000), TooLarge, "8000 x 8000 pixels"),
    "zip with ..": (lambda: zipped(["ok.png", "../../etc/x.png"]), Invalid, "lies outside"),
    "zip, absolute": (lambda: zipped(["/etc/x.png"]), Invalid, "lies outside"),
    "zip, backslashes": (lambda: zipped(["..\\x.png"]), Invalid, "lies outside"),
    "zip without pictures": (lambda: zipped(["a.txt"]), Invalid, "no pictures"),
    "broken zip": (lambda: zipped(["a.png"])[:60], Invalid, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_the_reason(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        read(make())


def test_limits_are_told_before_anything_is_decoded() -> None:
    with pytest.raises(TooLarge, match="bytes; 1000 are allowed"):
        read(b"x" * 1001, Limits(max_bytes=1000))
    with pytest.raises(TooLarge, match="more than 4 frames"):
        read(film(9), Limits(frames=4))
    with pytest.raises(TooLarge, match=r"0\.1 s are allowed"):
        read(film(12), Limits(seconds=0.1))


def test_the_death_of_the_decoder_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "child.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(decode, "CHILD", tmp_path / "child.py")
    with pytest.raises(Invalid, match="decoder ended"):
        read(b"anything")


def test_a_decoder_that_had_no_turn_is_no_fault_of_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sent it may send it again; a fit waits longer than a service."""
    (tmp_path / "child.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(decode, "CHILD", tmp_path / "child.py")
    with pytest.raises(NotReady, match="not decoded within 0.5 s: this machine is busy"):
        read(b"anything", Limits(wait=0.5))
    assert FILES.wait > 10 * Limits().wait
