"""Weights in few bits: integers with one float16 scale a group, so that a checkpoint of the lab is small enough to
ship.

A file `*.packed.safetensors` holds, for each tensor of two or more dimensions, `<name>` (int8, or two 4-bit numbers
a uint8) and `<name>.scale` (float16), both over rows of the flattened tensor cut into groups; other tensors lie
beside them as float16. Rounding is to the nearest; the largest number of a group is exact to the scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE = "model.packed.safetensors"
KEY = "packed"


def pack(state: Mapping[str, Tensor], file: Path, bits: int = 8, group: int = 0) -> None:
    """Write `state` in `bits` (8 or 4) per number. group: numbers that share a scale; 0: one output channel."""
    from safetensors.torch import save_file

    out: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, x in state.items():
        if x.ndim < 2:
            out[name] = x.detach().half().contiguous()
            continue
        shapes[name] = list(x.shape)
        rows = _grouped(x.detach().float(), group)
        top = 2 ** (bits - 1) - 1
        scale = (rows.abs().amax(1, keepdim=True) / top).clamp_min(1e-8).half()
        whole = (rows / scale.float()).round().clamp(-top, top).to(torch.int8)
        out[f"{name}.scale"] = scale[:, 0].contiguous()
        out[name] = whole.contiguous() if bits == 8 else _pairs(whole)
    about = {"bits": bits, "group": group, "shapes": shapes}
    save_file(out, file, {KEY: json.dumps(about, sort_keys=True)})  # one key: the order of several is not fixed


def load_packed(folder: Path) -> dict[str, Tensor]:
    """The float32 state of what `pack` wrote as `folder`/FILE."""
    from safetensors import safe_open

    out: dict[str, Tensor] = {}
    with safe_open(folder / FILE, "pt") as f:
        about = json.loads((f.metadata() or {}).get(KEY, "{}"))
        shapes, bits = about.get("shapes", {}), int(about.get("bits", 8))
        for name in f.keys():  # noqa: SIM118
            if name.removesuffix(".scale") in shapes and name.endswith(".scale"):
                continue
            x = f.get_tensor(name)
            if name not in shapes:
                out[name] = x.float()
                continue
            scale = f.get_tensor(f"{name}.scale").float()[:, None]
            rows = (x if bits == 8 else _singles(x)).reshape(scale.shape[0], -1)
            out[name] = (rows.float() * scale).flatten()[: math.prod(shapes[name])].reshape(shapes[name])
    return out


def _grouped(x: Tensor, group: int) -> Tensor:
    """(groups, n): channels, or runs of `group` numbers, the last one padded with zeros."""
    if not group:
        return x.reshape(x.shape[0], -1)
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % group)).reshape(-1, group)


def _pairs(whole: Tensor) -> Tensor:
    """int8 in -7..7 -> half as many uint8; the row length must be even."""
    flat = (whole.flatten() + 8).to(torch.uint8)
    return (flat[0::2] << 4) | flat[1::2]


def _singles(pairs: Tensor) -> Tensor:
    """What `_pairs` packed, as int8."""
    return torch.stack([pairs >> 4, pairs & 15], 1).flatten().to(torch.int8) - 8
