"""Cache of keys and values for the running batch: slots that sequences join and leave, within a memory limit.

Shapes: S slots, N columns, B active rows, T new tokens of each, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GROW = 256
"""Step in which columns are allocated, so that a short batch needs little memory"""


class SlotCache:
    """Cache of keys and values of many sequences, with the interface of transformers' Cache that decoders call.

    keys, values: per layer (S, heads, N, D). ids (S, N). lengths: tokens held per slot. During a forward, `starts` (B,)
    is the column of the first new token in the active slots [first, first + B).
    """

    is_compileable = False

    def __init__(
        self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, limit: int | None = None,
        devices: Sequence[torch.device] = (),
    ) -> None:  # fmt: skip
        """Create an empty cache.

        limit: largest number of bytes of keys and values; None: unlimited. device: where ids are; devices: where each
        layer is, if not all there.
        """
        self.token_bytes = 2 * layers * heads * width * dtype.itemsize
        """Bytes that one column of one slot takes"""
        self.limit = limit
        self.head_shape, self.dtype, self.device = (heads, width), dtype, device
        where = devices or [device] * layers
        self.keys = [torch.empty(0, heads, 0, width, dtype=dtype, device=at) for at in where]
        self.values = [torch.empty(0, heads, 0, width, dtype=dtype, device=at) for at in where]
        self.ids = torch.full((0, 0), -1, dtype=torch.long, device=device)
        self.lengths: list[int] = []
        self.first = 0
        self.starts = torch.zeros(0, dtype=torch.long, device=device)
        self.uniform: int | None = None
        """First new column of all rows in this forward, if it is the same; None otherwise"""
        self.columns = 0

    @property
    def layers(self) -> list[Tensor]:
        return self.keys

    def begin(self, first: int, starts: list[int], ids: Tensor, counts: list[int]) -> None:
        """Begin a forward over slots [first, first+B): row b brings counts[b] tokens of ids (B, T), right-padded."""
        B, T = ids.shape
        self._reserve(first + B, max(s + T for s in starts))
        self.first, self.starts = first, torch.tensor(starts, device=self.device)
        self.uniform = starts[0] if len(set(starts)) == 1 else None
        self.columns = max(s + T for s in starts)
        for b, (s, n) in enumerate(zip(starts, counts, strict=True)):
            self.ids[first + b, s : s + n] = ids[b, :n]
            self.ids[first + b, s + n : self.columns] = -1

    def tokens(self) -> Tensor:
        """Return the ids (B, K) held by the active slots, -1 where there is none."""
        return self.ids[self.first : self.first + len(self.starts), : self.columns]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, heads, T, D) and return views of all that the active slots hold."""
        B, T = keys.shape[0], keys.shape[2]
        rows = slice(self.first, self.first + B)
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if self.uniform is not None:
                store[rows, :, self.uniform : self.uniform + T] = new
            elif T == 1:
                at = self.starts.to(store.device)[:, None, None, None].expand(-1, new.shape[1], 1, new.shape[3])
                store[rows].scatter_(2, at, new)
            else:
                for b, s in enumerate(self.starts.tolist()):
                    store[self.first + b, :, s : s + T] = new[b]
            out.append(store[rows, :, : self.columns])
        return out[0], out[1]

    def fits(self, slots: int, columns: int) -> bool:
        """Return whether this many slots and columns stay within the limit."""
        return self.limit is None or slots * columns * self.token_bytes <= self.limit

    def get_seq_length(self, *_: Any) -> int:
        return int(self.starts.max()) if len(self.starts) else 0

    def wipe(self, slot: int) -> None:
        """Zero a failed row's slot: masked columns still take part in 0 * value, which would be NaN for NaN."""
        for store in (*self.keys, *self.values):
            if slot < len(store):
                store[slot] = 0.0
        if slot < len(self.ids):
            self.ids[slot] = -1

    def drop(self, slot: int) -> None:
        """Free a slot by moving the last one into its place."""
        last = len(self.lengths) - 1
        if slot != last:
            n = self.lengths[last]
            for store in (*self.keys, *self.values):
                store[slot, :, :n] = store[last, :, :n]
            self.ids[slot, :n] = self.ids[last, :n]
            self.ids[slot, n:] = -1
            self.lengths[slot] = n
        self.lengths.pop()

    def _reserve(self, slots: int, columns: int) -> None:
        """Grow keys, values and ids to at least these numbers of slots and columns."""
        S, N = self.ids.shape
        if slots <= S and columns <= N:
            return
        S2 = S if slots <= S else max(slots, min(2 * S, S + 16))
        N2 = N if columns <= N else rounded(columns)
        if self.limit is not None and S2 * N2 * self.token_bytes > self.limit:  # no more than is in use, then
            S2, used = slots, max(columns, *self.lengths)
            N2 = max(used, min(rounded(used), self.limit // (S2 * self.token_bytes)))
        heads, width = self.head_shape
        for stores in (self.keys, self.values):
            for i, old in enumerate(stores):
                if old.shape[0] == S2 and old.shape[2] == N2:
                    continue  # had grown already when memory ran out at an earlier attempt
                # zeros, because masked columns still take part in 0 * value
                new = torch.zeros(S2, heads, N2, width, dtype=self.dtype, device=old.device)
                new[: old.shape[0], :, : old.shape[2]] = old[:S2, :, :N2]  # slots and columns left out hold nothing
                stores[i] = new
        ids = torch.full((S2, N2), -1, dtype=torch.long, device=self.device)
        ids[:S, :N] = self.ids[:S2, :N2]
        self.ids = ids


def rounded(columns: int) -> int:
    """Round a number of columns up to the step of allocation."""
    return math.ceil(columns / GROW) * GROW
