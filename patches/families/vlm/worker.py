"""The worker of `vlm`: the decoder of `llm` whose prefill is of embeddings, pictures in place of their tokens.

Rows with and without pictures, of the base and of any patch, share one running batch: one KV cache, streaming, log
probabilities as for text. A picture is encoded once, on the worker's thread, when its row joins; rows that show the
same pictures (base beside patched, the rounds of an automatic mode) share what the tower said.

Shapes: B rows, T tokens, n image tokens of a row, D the decoder's width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patches.families.base import Base
from patches.families.llm.cache import SlotCache
from patches.families.llm.worker import Decoder, Row
from patches.families.vlm.layouts import Layout, image_token, layout
from registry.errors import Invalid

REMEMBERED = 64
"""rows whose encoded pictures are kept"""


@dataclass(eq=False, kw_only=True)
class Picture(Row):
    """A row that may show pictures."""

    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    """what the processor made of its pictures; empty: a row of text"""
    features: Tensor | None = None
    """(n, D) what stands in place of its image tokens; the worker fills it, or the caller brings it"""
    watch: tuple[int, ...] = ()
    """depths at which the prefill's states at image tokens are kept"""
    seen: Tensor | None = None
    """(len(watch), n, D) those states"""
    positions: Tensor | None = None
    """(3, T) rotary positions of the prompt, where pictures bend them"""
    delta: int = 0
    """what is added to a column to get the position of later tokens"""

    @property
    def shows(self) -> bool:
        return bool(self.pixels) or self.features is not None


class PictureDecoder(Decoder):
    """A running batch of `Picture` rows (and plain rows of text) on one vision-language base."""

    def __init__(self, base: Base, *more: Any, **how: Any) -> None:
        super().__init__(base, *more, **how)
        self.layout: Layout = layout(base.model)
        self.image = image_token(base.model)
        self.decoder = base.model.get_submodule(self.layout.root)
        self.head = base.model.get_submodule(self.layout.head)
        self.table = base.model.get_input_embeddings()
        self.encoded: OrderedDict[str, Tensor] = OrderedDict()

    def check(self, sequences: Iterable[Row]) -> None:
        """Raises TooLarge as text does, Invalid for image tokens without a picture or pictures without tokens."""
        sequences = list(sequences)
        super().check(sequences)
        for s in sequences:
            marks, shows = s.prompt.count(self.image), isinstance(s, Picture) and s.shows
            if bool(marks) != shows:
                raise Invalid(
                    f"The prompt holds {marks} image tokens and {'a' if shows else 'no'} picture; send a picture as a "
                    "content part, and leave its tokens to the processor."
                )
            if isinstance(s, Picture) and s.features is not None and len(s.features) != marks:
                raise Invalid(f"The prompt holds {marks} image tokens for {len(s.features)} features.")

    @torch.inference_mode()
    def _encode(self, rows: Sequence[Picture]) -> None:
        """Fill `features` of rows: same pictures once, same shapes in one call of the tower."""
        todo: dict[str, Picture] = {}
        for s in rows:
            if s.features is None:
                key = _key(s.pixels)
                if key in self.encoded:
                    self.encoded.move_to_end(key)
                else:
                    todo[key] = s
        alike = {k: s for k, s in todo.items() if set(s.pixels) == {"pixel_values"}}
        if len(alike) > 1 and len({tuple(s.pixels["pixel_values"].shape) for s in alike.values()}) == 1:
            whole = torch.cat([s.pixels["pixel_values"] for s in alike.values()])
            parts = self._features({"pixel_values": whole}).unflatten(0, (len(alike), -1))
            self.encoded.update(zip(alike, parts, strict=True))
            todo = {k: s for k, s in todo.items() if k not in alike}
        for key, s in todo.items():
            self.encoded[key] = self._features(s.pixels)
        for s in rows:
            if s.features is None:
                s.features = self.encoded[_key(s.pixels)]
            if self.layout.positions is not None and s.pixels:
                ids = torch.tensor([s.prompt], device=self.base.device)
                s.positions, s.delta = self.layout.positions(self.base.model, ids, self._here(s.pixels))
        while len(self.encoded) > REMEMBERED:
            self.encoded.popitem(last=False)

    def _features(self, pixels: Mapping[str, Tensor]) -> Tensor:
        return self.layout.features(self.base.model, self._here(pixels))

    def _here(self, pixels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.base.model.dtype
        return {
            k: v.to(self.base.device, dtype) if v.is_floating_point() else v.to(self.base.device)
            for k, v in pixels.items()
        }

    def _forward(self, rows: Sequence[Row], first: int, starts: list[int], ids: Tensor, counts: list[int]) -> Tensor:
        self._encode([s for b, s in enumerate(rows) if isinstance(s, Picture) and s.shows and starts[b] == 0])
        self.cache.begin(first, starts, ids, counts)
        device = ids.device
        columns = self.cache.starts[:, None] + torch.arange(ids.shape[1], device=device)
        x = self.table(ids)
        watched: list[tuple[int, Picture, Tensor]] = []
        for b, s in enumerate(rows):
            if isinstance(s, Picture) and s.features is not None and starts[b] == 0:
                at = ids[b] == self.image
                x[b, at] = s.features.to(x)
                if s.watch:
                    watched.append((b, s, at))
        call: dict[str, Any] = {
            "inputs_embeds": x,
            "position_ids": self._positions(rows, starts, columns),
            "attention_mask": self._mask(columns),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        hidden = self._call(rows, call, watched)
        return self._read(rows, hidden, starts, counts)

    def _undivided(self, row: Row) -> bool:
        """A picture's features are put in place at once."""
        return isinstance(row, Picture) and row.shows

    def _call(self, rows: Sequence[Row], call: dict[str, Any], watched: list[tuple[int, Picture, Tensor]]) -> Tensor:
        """(B, T, D) last hidden states, edited as the rows ask; what rows watch is kept."""
        inner = self.base.model.get_submodule(self.layout.decoder)
        kept: dict[int, Tensor] = {0: call["inputs_embeds"]}
        hooks = [
            inner.layers[d - 1].register_forward_hook(
                lambda _, __, out, d=d: kept.update({d: out[0] if isinstance(out, tuple) else out})
            )
            for d in sorted({d for _, s, _ in watched for d in s.watch})
            if d
        ]
        try:
            if self.applied is None:
                hidden: Tensor = self.decoder(**call).last_hidden_state
            else:
                with self.applied.rows([s.arm for s in rows], [s.strength for s in rows], [s.params for s in rows]):
                    hidden = self.decoder(**call).last_hidden_state
        finally:
            for h in hooks:
                h.remove()
        for b, s, at in watched:
            s.seen = torch.stack([kept[d][b, at] for d in s.watch]).clone()
        return hidden

    def _positions(self, rows: Sequence[Row], starts: list[int], columns: Tensor) -> Tensor:
        """Rotary positions: the columns themselves, or (3, B, T) where pictures bend them."""
        if self.layout.positions is None:
            return columns
        out = columns.expand(3, -1, -1).clone()
        for b, s in enumerate(rows):
            if not isinstance(s, Picture) or s.positions is None:
                continue
            if starts[b] == 0:
                n = s.positions.shape[1]
                out[:, b, :n] = s.positions.to(out.device)
            else:
                out[:, b] += s.delta
        return out

    def probe(self, arm: str | None) -> Picture:  # type: ignore[override]
        """A short row that any model of the family can decode: one picture of noise."""
        n, width = 4, self.table.weight.shape[1]
        noise = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(self.table.weight)
        start, *end = [i for i in (1, 2, 5, 6) if i != self.image][:3]
        return Picture([start, *[self.image] * n, *end], arm=arm, max_tokens=2, ignore_eos=True, features=noise)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Logits (1, V) of the probe under an arm: equal for equal behaviour, bit for bit."""
        row = self.probe(arm)
        row.strength = strength
        busy = self.cache
        self.cache = SlotCache(len(busy.keys), *busy.head_shape, busy.dtype, busy.device)
        try:
            return self._forward([row], 0, [0], torch.tensor([row.prompt], device=self.base.device), [len(row.prompt)])
        finally:
            self.cache = busy


def _key(pixels: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for name in sorted(pixels):
        v = pixels[name]
        digest.update(name.encode() + repr(tuple(v.shape)).encode())
        digest.update(v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
