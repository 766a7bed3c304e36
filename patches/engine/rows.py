"""Group batch rows by arm, with their strengths and row parameters, and index arithmetic on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from registry.errors import PatchError


@dataclass(frozen=True)
class Group:
    """Rows of one call that use the same arm, or arms that are alike."""

    arm: str
    at: Tensor | slice | None
    """Their indices in the batch; None: every row"""
    strength: Tensor | float
    """One number, or (rows of the group,)"""
    params: tuple[Mapping[str, Tensor], ...] = ()
    """Row parameters of each row; empty if no row has any"""
    repeat: int = 1
    """Number of neighbouring batch rows that each of `params` covers (beams, guidance)"""
    device: torch.device | None = None
    under: bool = False
    """Whether only the edits that the arm's others are made on are theirs (`Side.under`)"""
    arms: tuple[str, ...] = ()
    """All arms whose rows these are, if their edits are alike (`Act.alike`); empty: `arm` alone"""
    stacked: dict[str, Tensor | None] = field(default_factory=dict, compare=False)
    """Row parameters that have been stacked already"""

    def parameter(self, name: str) -> Tensor | None:
        """Return parameter `name` as (rows, ...); see `Inputs.row`."""
        if name not in self.stacked:
            made = _stack([p.get(name) for p in self.params], self.device)
            if made is not None and self.repeat > 1:
                made = made.repeat_interleave(self.repeat, 0)
            self.stacked[name] = made
        return self.stacked[name]

    def widened(self, k: int) -> Group:
        """Return the group for a batch in which each row is repeated k times in place."""
        wide = beamed(self.at, k), repeated(self.strength, k)
        return Group(self.arm, *wide, self.params, k, self.device, self.under, self.arms)


def _stack(values: Sequence[Tensor | None], device: torch.device | None) -> Tensor | None:
    """Stack one parameter over rows: (rows, ...), None as zeros, first dimensions zero-padded to the longest.

    Raises PatchError for different shapes otherwise.
    """
    there = [v for v in values if v is not None]
    if not there:
        return None
    first = there[0]
    if len({(v.shape[1:], v.ndim) for v in there}) > 1:
        raise PatchError(f"Row parameters of one name differ in shape: {sorted({tuple(v.shape) for v in there})}.")
    if len(there) == len(values) and len({(v.shape, v.dtype, v.device) for v in there}) == 1:
        return torch.stack(there).to(device)
    shape = (max(len(v) for v in there), *first.shape[1:]) if first.ndim else ()
    out = torch.zeros(len(values), *shape, dtype=first.dtype)
    for i, value in enumerate(values):
        if value is not None:
            out[(i, slice(len(value))) if first.ndim else i] = value.to(out.device)
    return out.to(device)


def add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    """Combine an attention mask (additive, boolean, or None: causal) with a bias into an additive one (B, h, T, K)."""
    T, K = bias.shape[-2:]
    lowest = torch.finfo(bias.dtype).min
    if mask is None:  # None means causal; the queries are the last T of K keys
        if T == 1:
            return bias
        future = torch.ones(T, K, dtype=torch.bool, device=bias.device).triu(K - T + 1)
        return bias.masked_fill(future, lowest)
    if mask.shape[-1] > K:  # the cache has spare columns
        bias = nn.functional.pad(bias, (0, mask.shape[-1] - K))
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, lowest)
    # clamp: the sum of two very negative numbers must not be -inf, or a fully masked row becomes NaN
    return (mask + bias).clamp_min(lowest)


def span(rows: list[int], count: int) -> Tensor | slice | None:
    """Return rows as a slice where they are neighbours (a view, no gather), None for all of them, else as indices."""
    if len(rows) == count:
        return None
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def strengths(rows: list[int], strength: Sequence[float] | None) -> Tensor | float:
    """Return the strengths of these rows: one number if all are equal, else (rows,)."""
    if strength is None:
        return 1.0
    used = [float(strength[i]) for i in rows]
    return used[0] if len(set(used)) == 1 else torch.tensor(used)


def shaped(strength: Tensor | float, x: Tensor) -> Any:
    """Reshape a strength so that it broadcasts over x (rows, ...)."""
    return strength.to(x).reshape(-1, *[1] * (x.ndim - 1)) if isinstance(strength, Tensor) else strength


def beamed(at: Tensor | slice | None, k: int) -> Tensor | slice | None:
    """Map row indices to a batch in which each row is repeated k times in place."""
    if isinstance(at, slice):
        return slice(at.start * k, at.stop * k)
    if at is None:
        return None
    return (at[:, None] * k + torch.arange(k)).reshape(-1)


def repeated(strength: Tensor | float, k: int) -> Tensor | float:
    """Repeat per-row strengths k times in place."""
    return strength.repeat_interleave(k) if isinstance(strength, Tensor) else strength
