"""Rows of a batch: which of them use which arm, at what strength, with which parameters; and arithmetic over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from registry.errors import PatchError


@dataclass(frozen=True)
class Group:
    """The rows of one call that use one arm."""

    arm: str
    at: Tensor | slice | None
    """None: every row"""
    strength: Tensor | float
    """a number, or (rows of the group,)"""
    params: tuple[Mapping[str, Tensor], ...] = ()
    """what each row says to its mechanism; empty if none says anything"""
    repeat: int = 1
    """neighbours in the batch that each of `params` stands for (beams, guidance)"""
    device: torch.device | None = None
    stacked: dict[str, Tensor | None] = field(default_factory=dict, compare=False)
    """parameters that were asked for already"""

    def parameter(self, name: str) -> Tensor | None:
        """(rows, ...) of parameter `name`; see `Inputs.row`."""
        if name not in self.stacked:
            made = _stack([p.get(name) for p in self.params], self.device)
            if made is not None and self.repeat > 1:
                made = made.repeat_interleave(self.repeat, 0)
            self.stacked[name] = made
        return self.stacked[name]

    def widened(self, k: int) -> Group:
        """The same rows where each stands for k neighbours of the batch."""
        wide = beamed(self.at, k), repeated(self.strength, k)
        return Group(self.arm, *wide, self.params, k, self.device)


def _stack(values: Sequence[Tensor | None], device: torch.device | None) -> Tensor | None:
    """(rows, ...) of one parameter per row, None as zeros, first dimensions padded with zeros to the longest."""
    there = [v for v in values if v is not None]
    if not there:
        return None
    first = there[0]
    if len({(v.shape[1:], v.ndim) for v in there}) > 1:
        raise PatchError(f"Row parameters of one name differ in shape: {sorted({tuple(v.shape) for v in there})}.")
    shape = (max(len(v) for v in there), *first.shape[1:]) if first.ndim else ()
    out = torch.zeros(len(values), *shape, dtype=first.dtype)
    for i, value in enumerate(values):
        if value is not None:
            out[(i, slice(len(value))) if first.ndim else i] = value.to(out.device)
    return out.to(device)


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """An additive mask (B, h, T, K) from what the attention would have used and the bias."""
    T, K = bias.shape[-2:]
    lowest = torch.finfo(bias.dtype).min
    if mask is None:  # the attention would have used its causal flag; queries are the last T of K keys
        if T == 1:
            return bias
        future = torch.ones(T, K, dtype=torch.bool, device=bias.device).triu(K - T + 1)
        return bias.masked_fill(future, lowest)
    if mask.shape[-1] > K:  # a cache with room to spare
        bias = nn.functional.pad(bias, (0, mask.shape[-1] - K))
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, lowest)
    # clamp: two very negative numbers must not become -inf, or a fully masked row turns into NaN
    return (mask + bias).clamp_min(lowest)


def span(rows: list[int], count: int) -> Tensor | slice | None:
    """Neighbouring rows as a slice (a view, no gather); None for all of them."""
    if len(rows) == count:
        return None
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def strengths(rows: list[int], strength: Sequence[float] | None) -> Tensor | float:
    if strength is None:
        return 1.0
    used = [float(strength[i]) for i in rows]
    return used[0] if len(set(used)) == 1 else torch.tensor(used)


def shaped(strength: Tensor | float, x: Tensor) -> Any:
    """The strength so that it multiplies x (rows, ...)."""
    return strength.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(strength, Tensor) else strength


def beamed(at: Tensor | slice | None, k: int) -> Tensor | slice | None:
    if isinstance(at, slice):
        return slice(at.start * k, at.stop * k)
    if at is None:
        return None
    return (at[:, None] * k + torch.arange(k)).reshape(-1)


def repeated(strength: Tensor | float, k: int) -> Tensor | float:
    return strength.repeat_interleave(k) if isinstance(strength, Tensor) else strength
