"""The process that decodes one clip: bytes on stdin, one line of JSON and raw pixels on stdout.

Run by path with `python -I`, so it imports nothing of patchbay and no torch. Whatever happens here ends this process
and no other.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import zipfile
from pathlib import PurePosixPath
from typing import Any

import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Refused(Exception):
    """Why a clip is refused, and as what."""

    def __init__(self, why: str, kind: str = "Invalid") -> None:
        super().__init__(why)
        self.kind = kind


class Frames:
    """Frames as they come, counted against the limits."""

    def __init__(self, limits: dict[str, Any]) -> None:
        self.limits = limits
        self.kept: list[Any] = []
        self.times: list[float] = []
        self.until = 0.0
        self.size: tuple[int, int] | None = None
        self.shape: tuple[int, int] | None = None

    def claim(self, width: int, height: int, seconds: float | None = None) -> None:
        """Check what a header says, before a pixel is decoded."""
        if width * height > self.limits["pixels"]:
            raise Refused(
                f"The clip has {width} x {height} pixels; {self.limits['pixels']} together are allowed.", "TooLarge"
            )
        if min(width, height) < 8:
            raise Refused(f"The clip has {width} x {height} pixels; its sides must be at least 8.")
        if seconds is not None and seconds > self.limits["seconds"]:
            raise Refused(
                f"The clip says it lasts {seconds:.0f} s; {self.limits['seconds']:g} s are allowed.", "TooLarge"
            )

    def add(self, picture: Any, time: float) -> None:
        """One frame as a Pillow picture."""
        self.claim(picture.width, picture.height, time)
        if len(self.kept) >= self.limits["frames"]:
            raise Refused(f"The clip has more than {self.limits['frames']} frames.", "TooLarge")
        if self.size is None:
            self.size = (picture.height, picture.width)
            shrink = min(1.0, self.limits["side"] / min(picture.size))
            self.shape = (max(1, round(picture.height * shrink)), max(1, round(picture.width * shrink)))
        assert self.shape is not None
        if (picture.height, picture.width) != self.shape:
            picture = picture.resize((self.shape[1], self.shape[0]))
        self.kept.append(np.asarray(picture.convert("RGB")))
        self.times.append(max(time, self.times[-1]) if self.times else time)


def video(raw: bytes, out: Frames) -> None:
    """Every frame of the first video stream, by PyAV."""
    try:
        import av
    except ImportError:
        raise Refused(
            "Videos need the extra `video` (pip install patchbay[video]). GIF, WebP and zip files of pictures "
            "are read without it.",
            "NotReady",
        ) from None
    try:
        with av.open(io.BytesIO(raw), mode="r", metadata_errors="ignore") as container:
            if not container.streams.video:
                raise Refused(
                    "The file holds no video stream, only "
                    + (", ".join(s.type for s in container.streams) or "nothing")
                    + "."
                )
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            claimed = container.duration / av.time_base if container.duration else None
            out.claim(stream.codec_context.width or 8, stream.codec_context.height or 8, claimed)
            first, rate = None, float(stream.average_rate or 25)
            for frame in container.decode(stream):
                out.claim(frame.width, frame.height)
                time = frame.time if frame.time is not None else len(out.kept) / rate
                first = time if first is None else first
                out.add(frame.to_image(), max(0.0, time - first))
    except (av.error.FFmpegError, ValueError, UnicodeError) as e:
        if len(out.kept) < 2:  # what was decoded before the damage is a clip as well
            raise Refused(f"The file is no video that can be decoded, or it is cut off ({str(e)[:120]}).") from None


def animation(raw: bytes, out: Frames) -> None:
    """An animated GIF or WebP, by Pillow."""
    from PIL import Image, ImageSequence

    with Image.open(io.BytesIO(raw), formats=("GIF", "WEBP", "PNG")) as picture:
        out.claim(*picture.size)
        time = 0.0
        for frame in ImageSequence.Iterator(picture):
            out.add(frame.convert("RGB"), time)
            lasts = frame.info.get("duration") or 0
            time += max(lasts or 40, 1) / 1000
            out.until = time if lasts else 0.0


def archive(raw: bytes, out: Frames) -> None:
    """A zip file of pictures in the order of their names. Names that leave the folder refuse the file."""
    from PIL import Image

    with zipfile.ZipFile(io.BytesIO(raw)) as held:
        names = [n for n in held.namelist() if not n.endswith("/")]
        for name in names:
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
                raise Refused(f"The zip file names {name[:60]!r}, which lies outside it.")
        shown = sorted(
            n
            for n in names
            if PurePosixPath(n).suffix.lower() in PICTURES and not PurePosixPath(n).name.startswith(".")
        )
        if not shown:
            raise Refused(f"The zip file holds no pictures ({', '.join(PICTURES)}).")
        if len(shown) > out.limits["frames"]:
            raise Refused(f"The zip file holds {len(shown)} pictures; {out.limits['frames']} are allowed.", "TooLarge")
        for i, name in enumerate(shown):
            about = held.getinfo(name)
            if about.file_size > out.limits["max_bytes"]:
                raise Refused(
                    f"{name[:60]!r} unpacks to {about.file_size} bytes; {out.limits['max_bytes']} are allowed.",
                    "TooLarge",
                )
            with Image.open(io.BytesIO(held.read(name)), formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
                out.claim(*picture.size)
                out.add(picture.convert("RGB"), i / 25)


def decode(raw: bytes, limits: dict[str, Any]) -> Frames:
    """All frames of a clip, whatever kind of file it is."""
    out = Frames(limits)
    if raw[:4] == b"PK\x03\x04" or raw[:4] == b"PK\x05\x06":
        archive(raw, out)
    elif raw[:4] == b"GIF8" or (raw[:4] == b"RIFF" and raw[8:12] == b"WEBP") or raw[:8] == b"\x89PNG\r\n\x1a\n":
        animation(raw, out)
    else:
        video(raw, out)
    if not out.kept:
        raise Refused("The clip holds no frames.")
    return out


def main() -> None:
    """Decode stdin under the limits in the first argument."""
    limits = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limits["timeout"]) + 1,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raw, out = sys.stdin.buffer.read(), sys.stdout.buffer
    try:
        got = decode(raw, limits)
        pixels = np.stack(got.kept)
        head = {"shape": pixels.shape[:3], "times": got.times, "until": got.until, "size": got.size}
        out.write(json.dumps(head).encode() + b"\n")
        out.write(pixels.tobytes())
    except Refused as e:
        out.write(json.dumps({"error": str(e), "kind": e.kind}).encode() + b"\n")
    except MemoryError:
        sys.exit(3)
    except Exception as e:  # Pillow and zipfile have a hundred ways to say that a file is broken
        out.write(
            json.dumps(
                {"error": f"The clip cannot be read ({type(e).__name__}: {str(e)[:120]}).", "kind": "Invalid"}
            ).encode()
            + b"\n"
        )


if __name__ == "__main__":
    main()
