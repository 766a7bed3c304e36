"""Reads clips that somebody sent: decoded by a process of their own, with limits, so that its death is one error.

    clip = read(raw, Limits(seconds=20))          # clip.frames (n, 3, h, w) uint8, clip.times (n,) seconds

Videos go through PyAV (the extra `video`), animated GIF and WebP and zip files of pictures through Pillow. What a
header claims is checked against the limits, and then not believed: frames are counted by decoding them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from registry.errors import Invalid, NotReady, TooLarge

SHORTEST = 0.05
"""seconds of an animation that each sampled frame must stand for, where frames are shown more than once"""
CHILD = Path(__file__).parent / "decoder.py"
KINDS = {"Invalid": Invalid, "TooLarge": TooLarge, "NotReady": NotReady}


@dataclass(frozen=True)
class Limits:
    """What a clip may be, and what its decoding may cost."""

    max_bytes: int = 64 << 20
    seconds: float = 60.0
    """claimed or decoded"""
    pixels: int = 4_200_000
    """Pixels that one frame may have: 2560 x 1600 and some"""
    frames: int = 1800
    side: int = 256
    """frames are shrunk to this shorter edge as they are decoded"""
    memory: int = 2 << 30
    """bytes of address space of the decoder"""
    timeout: float = 20.0
    """seconds of processor time"""
    wait: float = 35.0
    """seconds of wall time, which a decoder that is not given a processor takes as well"""


@dataclass(frozen=True)
class Decoded:
    """A decoded clip."""

    frames: Tensor
    """(n, 3, h, w) uint8, the shorter edge at most `Limits.side`"""
    times: Tensor
    """(n,) float64 seconds, never falling"""
    size: tuple[int, int]
    """height and width as sent"""
    until: float = 0.0
    """seconds at which an animation's last frame ends; 0 where the file does not say"""


def read(raw: bytes, limits: Limits = Limits()) -> Decoded:
    """Decode a file's bytes.

    Raises TooLarge beyond a limit, Invalid for what is no clip or is damaged (with the decoder's own word for it),
    NotReady if videos cannot be decoded here, or not in time.
    """
    if len(raw) > limits.max_bytes:
        raise TooLarge(f"The clip's file has {len(raw)} bytes; {limits.max_bytes} are allowed.")
    if not raw:
        raise Invalid("The clip's file is empty.")
    command = [sys.executable, "-I", str(CHILD), json.dumps(asdict(limits))]
    try:
        done = subprocess.run(command, input=raw, capture_output=True, timeout=limits.wait, check=False)
    except subprocess.TimeoutExpired:
        raise NotReady(
            f"The clip was not decoded within {limits.wait:g} s: this machine is busy, or the file stalls the decoder. "
            "Send it again, or a shorter or plainer one."
        ) from None
    head, _, body = done.stdout.partition(b"\n")
    if done.returncode != 0 or not head:
        raise Invalid(
            f"The decoder ended ({_reason(done.returncode)}): the clip is damaged, or costs more than "
            f"{limits.timeout:g} s or {limits.memory >> 20} MiB to decode."
        )
    about = json.loads(head)
    if "error" in about:
        raise KINDS.get(about["kind"], Invalid)(about["error"])
    n, h, w = about["shape"]
    pixels = np.frombuffer(body, np.uint8).reshape(n, h, w, 3)
    frames = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()
    return Decoded(frames, torch.tensor(about["times"], dtype=torch.float64), tuple(about["size"]), about["until"])


def _reason(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"


def sample(clip: Decoded, count: int, stride: int = 0, start: float = 0.0) -> tuple[Tensor, list[int]]:
    """Choose `count` frames: (count, 3, h, w) and their numbers.

    stride: every stride-th frame from `start` seconds on; 0: evenly over the whole of the clip in time, whatever its
    rate. Writers of animations keep equal frames as one that is shown for longer: where such a file has too few, what
    is on the screen at each time is taken, so numbers repeat. Raises Invalid if the clip has too few frames.
    """
    n = len(clip.frames)
    first = int((clip.times >= clip.times[0] + start).nonzero()[0]) if start and float(clip.times[-1]) >= start else 0
    need = (count - 1) * max(1, stride) + 1
    if n - first < need:
        lasts = clip.until - float(clip.times[first])
        if not stride and lasts >= count * SHORTEST:
            middle = float(clip.times[first]) + lasts * (torch.arange(count, dtype=torch.float64) + 0.5) / count
            at = (torch.searchsorted(clip.times, middle, right=True) - 1).tolist()
            return clip.frames[at], at
        alone = " Equal frames may be kept as one by who writes the file; a zip file of pictures keeps them." * (n == 1)
        raise Invalid(
            f"The clip has {n - first} frames from there on; this model needs {need}. Send a longer one.{alone}"
        )
    if stride:
        at = [first + i * stride for i in range(count)]
    else:
        wanted = torch.linspace(float(clip.times[first]), float(clip.times[-1]), count, dtype=torch.float64)
        at = [int((clip.times - t).abs().argmin()) for t in wanted]
        # equal or doubled time stamps must not repeat a frame while others are left out
        at = at if len(set(at)) == count else torch.linspace(first, n - 1, count).round().long().tolist()
    return clip.frames[at], at


def cropped(frames: Tensor, size: int) -> Tensor:
    """(n, 3, h, w) uint8 -> (n, 3, size, size): shorter edge resized (bilinear, antialiased), middle cut out."""
    h, w = frames.shape[-2:]
    if (h, w) != (size, size):
        new = (size, max(size, round(w * size / h))) if h <= w else (max(size, round(h * size / w)), size)
        frames = nnf.interpolate(frames.float(), size=new, mode="bilinear", antialias=True, align_corners=False)
        frames = frames.round().clamp(0, 255).to(torch.uint8)
    h, w = frames.shape[-2:]
    y, x = (h - size) // 2, (w - size) // 2
    return frames[..., y : y + size, x : x + size].contiguous()


def fit(clip: Decoded, frames: int, size: int, stride: int = 0) -> Tensor:
    """The (frames, 3, size, size) that a model reads of a clip: sampled, resized and cropped."""
    return cropped(sample(clip, frames, stride)[0], size)
