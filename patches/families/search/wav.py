"""RIFF/WAVE files -> samples: PCM of 8 to 32 bits and IEEE floats, any number of channels, with numpy alone."""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor

from registry.errors import Invalid, TooLarge

MAX_SECONDS = 60.0
MAX_BYTES = 24 << 20
RATES = (1000, 192_000)
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


def decode(data: bytes) -> tuple[Tensor, int]:
    """Samples (n,) float32 in [-1, 1], channels averaged, and their rate in Hz.

    Raises Invalid for what is no such file, naming what it is instead; TooLarge beyond MAX_BYTES and MAX_SECONDS.
    """
    if len(data) > MAX_BYTES:
        raise TooLarge(f"The sound has {len(data)} bytes; at most {MAX_BYTES}.")
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise Invalid(f"This is no WAVE file: it begins with {data[:4]!r}. Send RIFF/WAVE (.wav), PCM or float.")
    layout, body = None, None
    at = 12
    while at + 8 <= len(data) and body is None:
        name, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        chunk = data[at + 8 : at + 8 + size]
        if name == b"fmt " and len(chunk) >= 16:
            layout = struct.unpack("<HHIIHH", chunk[:16])
            if layout[0] == _EXTENSIBLE and len(chunk) >= 26:
                layout = (struct.unpack("<H", chunk[24:26])[0], *layout[1:])
        elif name == b"data":
            body = chunk
        at += 8 + size + size % 2
    if layout is None or body is None:
        raise Invalid("The WAVE file has no format or no samples; it was cut off.")
    kind, channels, rate, _, _, bits = layout
    if not 1 <= channels <= 16 or not RATES[0] <= rate <= RATES[1]:
        raise Invalid(f"{channels} channels at {rate} Hz: 1 to 16 channels at {RATES[0]} to {RATES[1]} Hz are read.")
    samples = _samples(body, kind, bits)
    samples = samples[: len(samples) // channels * channels].reshape(-1, channels).mean(1)
    if not len(samples):
        raise Invalid("The WAVE file holds no sample.")
    if len(samples) > rate * MAX_SECONDS:
        raise TooLarge(f"The sound lasts {len(samples) / rate:.0f} s; at most {MAX_SECONDS:g} s.")
    if not np.isfinite(samples).all():
        raise Invalid("The WAVE file holds numbers that are not finite.")
    return torch.from_numpy(samples.astype(np.float32)), rate


def _samples(body: bytes, kind: int, bits: int) -> np.ndarray:
    width = bits // 8
    if kind == _FLOAT and bits in (32, 64):
        return np.frombuffer(body[: len(body) // width * width], f"<f{width}").astype(np.float64)
    if kind == _PCM and bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float64) - 128) / 128
    if kind == _PCM and bits in (16, 32):
        return np.frombuffer(body[: len(body) // width * width], f"<i{width}").astype(np.float64) / 2 ** (bits - 1)
    if kind == _PCM and bits == 24:
        parts = np.frombuffer(body[: len(body) // 3 * 3], np.uint8).reshape(-1, 3).astype(np.int32)
        whole = parts[:, 0] | parts[:, 1] << 8 | parts[:, 2] << 16
        return (whole - ((whole >> 23) << 24)).astype(np.float64) / 2**23
    raise Invalid(
        f"Samples of format {kind} with {bits} bits cannot be read; send PCM of 8, 16, 24 or 32 bits, or floats."
    )


def encode(samples: Tensor, rate: int) -> bytes:
    """A WAVE file of 16-bit PCM, one channel, of samples (n,) in [-1, 1]."""
    body = (samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, _PCM, 1, rate, 2 * rate,
                       2, 16, b"data", len(body))  # fmt: skip
    return head + body


def resampled(samples: Tensor, rate: int, to: int) -> Tensor:
    """Samples at another rate, low-passed before they are thinned out (polyphase)."""
    if rate == to:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, to)
    return torch.from_numpy(resample_poly(samples.numpy(), to // common, rate // common).astype(np.float32))
