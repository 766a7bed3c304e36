"""Room for recorded activations, told before it is taken: memory, in bfloat16 if asked for, or files on a disk.

$PATCHBAY_STREAM: `fp32` (default) or `bf16`, which halves them. $PATCHBAY_STREAM_FOLDER: a folder for one file (shard)
per recorded site, mapped into memory and gone with the process. Batches are float32 on the base's device either way.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from registry.errors import ConfigError, NotReady

log = logging.getLogger("patchbay")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARE = 0.8
"""Part of the free memory or disk that may be taken"""
WORTH_SAYING = 1 << 30
"""Bytes from which the need is printed"""


def kept_as() -> torch.dtype:
    """Return the dtype that activations are kept in. Raises ConfigError for an unknown word."""
    word = os.environ.get("PATCHBAY_STREAM") or "fp32"
    if word not in KINDS:
        raise ConfigError(f"PATCHBAY_STREAM={word[:20]!r} is none of {', '.join(KINDS)}.")
    return KINDS[word]


def check(sites: int, shape: Sequence[int], device: torch.device) -> int:
    """Return the bytes that `sites` recordings of `shape` (n, T, D) need, after telling them.

    Raises NotReady naming need, room and the ways out if they do not fit.
    """
    need = sites * math.prod(shape) * kept_as().itemsize
    folder = os.environ.get("PATCHBAY_STREAM_FOLDER")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        free, where = shutil.disk_usage(folder).free, f"the disk of {folder}"
    elif device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], str(device)
    else:
        free, where = psutil.virtual_memory().available, "memory"
    what = f"{shape[0]:,} pictures x {shape[1]} tokens x {shape[2]} at {sites} sites need {need / 2**30:.1f} GiB"
    if need > SHARE * free:
        raise NotReady(
            f"{what}, and {where} has {free / 2**30:.1f} GiB free. Record fewer pictures or layers, keep them as "
            "PATCHBAY_STREAM=bf16, or in files: PATCHBAY_STREAM_FOLDER=<folder>."
        )
    (log.warning if need >= WORTH_SAYING else log.info)("activations: %s of %s", what, where)
    return need


def taken(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return an empty recording of `shape` (n, T, D): on `device`, or a file of $PATCHBAY_STREAM_FOLDER mapped in."""
    dtype, folder = kept_as(), os.environ.get("PATCHBAY_STREAM_FOLDER")
    if not folder:
        return torch.empty(*shape, dtype=dtype, device=device)
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix="shard-")
    os.close(handle)
    mapped = torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype)
    os.unlink(name)  # the mapping keeps it until nobody uses it
    return mapped.view(*shape)
