"""Keys and values of the running batch: slots that sequences join and leave, within a number of bytes.

Shapes: S slots, N columns, B active rows, T new tokens of each, D width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

GROW = 256
"""columns and slots are added in steps, so that a short batch costs little memory"""


class SlotCache:
    """Keys and values of many sequences; the interface of transformers' Cache that decoders call.

    keys, values: per layer (S, heads, N, D). ids (S, N). lengths: tokens held per slot. During a forward, `starts` (B,)
    says where the new tokens of the active slots [first, first + B) go.
    """

    is_compileable = False

    def __init__(
        self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device, limit: int | None = None
    ) -> None:
        """limit: Bytes of keys and values that may be held; None: as many as are asked for."""
        self.token_bytes = 2 * layers * heads * width * dtype.itemsize
        """what one column of one slot takes"""
        self.limit = limit
        self.head_shape, self.dtype, self.device = (heads, width), dtype, device
        self.keys = [torch.empty(0, heads, 0, width, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(0, heads, 0, width, dtype=dtype, device=device) for _ in range(layers)]
        self.ids = torch.full((0, 0), -1, dtype=torch.long, device=device)
        self.lengths: list[int] = []
        self.first = 0
        self.starts = torch.zeros(0, dtype=torch.long, device=device)
        self.uniform: int | None = None
        """where all rows of this forward start, if they start at one column"""
        self.columns = 0

    @property
    def layers(self) -> list[Tensor]:
        return self.keys

    def begin(self, first: int, starts: list[int], ids: Tensor, counts: list[int]) -> None:
        """Open a forward over slots [first, first+B): row b brings counts[b] real tokens, ids (B, T) right padded."""
        B, T = ids.shape
        self._reserve(first + B, max(s + T for s in starts))
        self.first, self.starts = first, torch.tensor(starts, device=self.device)
        self.uniform = starts[0] if len(set(starts)) == 1 else None
        self.columns = max(s + T for s in starts)
        for b, (s, n) in enumerate(zip(starts, counts, strict=True)):
            self.ids[first + b, s : s + n] = ids[b, :n]
            self.ids[first + b, s + n : self.columns] = -1

    def tokens(self) -> Tensor:
        """(B, K) ids held by the active slots, -1 where there is none."""
        return self.ids[self.first : self.first + len(self.starts), : self.columns]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store (B, heads, T, D) and return views of everything the active slots hold."""
        B, T = keys.shape[0], keys.shape[2]
        rows = slice(self.first, self.first + B)
        out = []
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if self.uniform is not None:
                store[rows, :, self.uniform : self.uniform + T] = new
            elif T == 1:
                at = self.starts[:, None, None, None].expand(-1, new.shape[1], 1, new.shape[3])
                store[rows].scatter_(2, at, new)
            else:
                for b, s in enumerate(self.starts.tolist()):
                    store[self.first + b, :, s : s + T] = new[b]
            out.append(store[rows, :, : self.columns])
        return out[0], out[1]

    def fits(self, slots: int, columns: int) -> bool:
        """Whether so many slots of so many columns stay within the limit."""
        return self.limit is None or slots * columns * self.token_bytes <= self.limit

    def get_seq_length(self, *_: Any) -> int:
        return int(self.starts.max()) if len(self.starts) else 0

    def wipe(self, slot: int) -> None:
        """Forget what a failed row wrote: a masked column still takes part in 0 * value, and it may be NaN."""
        for store in (*self.keys, *self.values):
            if slot < len(store):
                store[slot] = 0.0
        if slot < len(self.ids):
            self.ids[slot] = -1

    def drop(self, slot: int) -> None:
        """Free a slot: the last one takes its place."""
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
                    continue  # memory ran out on the way the last time; this one had grown
                # zeros, because a masked column still takes part in 0 * value
                new = torch.zeros(S2, heads, N2, width, dtype=self.dtype, device=self.device)
                new[: old.shape[0], :, : old.shape[2]] = old[:S2, :, :N2]  # slots and columns left out hold nothing
                stores[i] = new
        ids = torch.full((S2, N2), -1, dtype=torch.long, device=self.device)
        ids[:S, :N] = self.ids[:S2, :N2]
        self.ids = ids


def rounded(columns: int) -> int:
    """`columns` as they are allocated."""
    return math.ceil(columns / GROW) * GROW
