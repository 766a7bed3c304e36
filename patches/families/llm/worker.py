"""Continuous decoding: sequences of any patch join and leave one running batch on one copy of the base.

Keys and values lie in slots, row b's token t in column t, so a sequence joins without moving anybody (no left
padding), and leaves by letting the last slot take its place. One `Decoder` belongs to one thread.
This is what evaluations, MLflow and the services all run.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patches.engine.isolate import fail, isolate, not_finite, usable
from patches.engine.patch import Applied
from patches.families.base import Base
from patches.families.worker import Job, Worker
from registry.errors import Failed, Invalid, TooLarge

# transformers renames this argument in 5.40, which pyproject.toml keeps out; until then it would say so in every log
warnings.filterwarnings("ignore", message=".*past_key_values. is deprecated", category=FutureWarning)

log = logging.getLogger("patchbay")

GROW = 256
"""columns and slots are added in steps, so that a short batch costs little memory"""
PREFILL_TOKENS = 2048
"""padded prompt tokens in one forward; more would make running rows wait longer"""
COLD = 1e-4
"""temperatures below take the most likely token: logits divided by less leave what float32 can say"""


@dataclass(eq=False)
class Row(Job):
    """One row being decoded; `Decoder` fills `out`."""

    prompt: list[int]
    max_tokens: int = 16
    temperature: float = 0.0
    """0: greedy"""
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    """how many alternatives to report beside each token; None: no log-probabilities at all"""
    bias: dict[int, float] = field(default_factory=dict)
    """token id -> added to its logit"""
    ignore_eos: bool = False
    out: list[int] = field(default_factory=list)
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """per token: its log-probability (before temperature), and the most likely alternatives"""
    generator: torch.Generator | None = None


class SlotCache:
    """Keys and values of many sequences; the interface of transformers' Cache that decoders call.

    keys, values: per layer (S, heads, N, D). ids (S, N). lengths: tokens held per slot. During a forward, `starts` (B,)
    says where the new tokens of the active slots [first, first + B) go.
    """

    is_compileable = False

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
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
        N2 = N if columns <= N else math.ceil(columns / GROW) * GROW
        heads, width = self.head_shape
        for stores in (self.keys, self.values):
            for i, old in enumerate(stores):
                if old.shape[0] >= S2 and old.shape[2] >= N2:
                    continue  # memory ran out on the way the last time; this one had grown
                # zeros, because a masked column still takes part in 0 * value
                new = torch.zeros(S2, heads, N2, width, dtype=self.dtype, device=self.device)
                new[: old.shape[0], :, : old.shape[2]] = old[:S2, :, :N2]
                stores[i] = new
        ids = torch.full((S2, N2), -1, dtype=torch.long, device=self.device)
        ids[:S, :N] = self.ids
        self.ids = ids


class Decoder(Worker[Row]):
    """A running batch: `add` sequences, call `step` until `idle`."""

    def __init__(self, base: Base, applied: Applied | None = None, slots: int = 32, context: int | None = None) -> None:
        config = base.model.config.get_text_config()  # of a model that also sees, the part that reads
        self.base, self.applied, self.slots = base, applied, slots
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        """prompt and answer together, in tokens"""
        layers = getattr(config, "layer_types", None) or ()
        self.window = config.sliding_window if "sliding_attention" in layers else None
        self.cap = getattr(config, "final_logit_softcapping", None)
        """what Gemma 2 squashes its logits to; read once, for a config takes its time to answer"""
        self.reset()
        model = base.model
        eos = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self.stops = {base.processor.eos_token_id, *([eos] if isinstance(eos, int) else eos or [])}
        self.decoder = model.get_decoder()  # type: ignore[operator]
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        """token ids the model has a row for; a tokenizer may know more"""

    def reset(self) -> None:
        """Forget what is queued, running and cached."""
        model, config = self.base.model, self.base.model.config.get_text_config()
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = SlotCache(config.num_hidden_layers, heads, width, model.dtype, self.base.device)  # type: ignore[arg-type]
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        """running[i] lies in slot i"""

    def check(self, sequences: Iterable[Row]) -> None:
        """Raises TooLarge if one does not fit the context, Invalid if it has a token that the model has no row for
        (on a GPU one such id would end everybody's context)."""
        for s in sequences:
            if not s.prompt or len(s.prompt) + s.max_tokens > self.context:
                raise TooLarge(
                    f"The prompt has {len(s.prompt)} tokens and max_tokens is {s.max_tokens}; together they must be "
                    f"between 1 and {self.context}. Shorten the prompt or lower max_tokens."
                )
            for token in (max(s.prompt), min(s.prompt), *s.bias):
                if not 0 <= token < self.vocabulary:
                    raise Invalid(
                        f"Token {token} is beyond the vocabulary of {self.vocabulary} of {self.base.name}, though its "
                        "tokenizer may know it. Leave out the text that becomes it."
                    )

    @torch.inference_mode()
    def cancel(self, sequence: Row) -> None:
        """Stop one sequence now; the others do not notice."""
        if sequence.finished:
            return
        sequence.finished = "cancelled"
        if sequence in self.running:
            self._leave(self.running.index(sequence))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """One forward: prefill of some waiting sequences if there is room, else one token for all running ones.

        Returns the sequences that got a token or failed; those finished among them have left the batch. A sequence
        that makes the forward raise, or whose logits are not finite, fails alone.
        """
        joined = self._admit()
        rows = joined or list(self.running)
        if not rows:
            return []
        first = len(self.running) - len(joined) if joined else 0
        slots = {id(s): first + b for b, s in enumerate(rows)}
        isolate(rows, lambda some: self._advance(some, slots[id(some[0])], bool(joined)), self._size)
        for slot in reversed(range(first, first + len(rows))):
            if self.running[slot].finished:
                self._leave(slot)
        return rows

    def _advance(self, rows: Sequence[Row], first: int, joining: bool) -> None:
        """The next token of neighbouring rows, which lie in slots first, first + 1, ... Nothing is kept if it raises:
        lengths advance last, and columns beyond them are written again."""
        if joining:
            counts = [len(s.prompt) for s in rows]
            ids = torch.zeros(len(rows), max(counts), dtype=torch.long)
            for b, s in enumerate(rows):
                ids[b, : counts[b]] = torch.tensor(s.prompt)
            starts = [0] * len(rows)
        else:
            counts = [1] * len(rows)
            ids = torch.tensor([[s.out[-1]] for s in rows])
            starts = self.cache.lengths[first : first + len(rows)]
        logits = self._forward(rows, first, starts, ids.to(self.base.device), counts)
        tokens = self._choose(rows, logits)
        for b, (s, token) in enumerate(zip(rows, tokens, strict=True)):
            self.cache.lengths[first + b] = starts[b] + counts[b]
            if token is None:
                continue
            s.out.append(token)
            if token in self.stops and not s.ignore_eos:
                s.finished = "stop"
            elif len(s.out) >= s.max_tokens:
                s.finished = "length"

    @staticmethod
    def _size(row: Row) -> float:
        """Tokens, prompt and answer."""
        return len(row.prompt) + len(row.out)

    @staticmethod
    def probe(arm: str | None) -> Row:
        """A short row that any model can decode."""
        return Row([1, 2, 3], arm=arm, max_tokens=2, ignore_eos=True)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Logits (1, 8, V) of a fixed input under an arm: equal for equal behaviour, bit for bit. Raises Failed if
        they are not finite."""
        assert self.applied is not None
        with self.applied.rows([arm], [strength]):
            out: Tensor = self.base.model(input_ids=torch.arange(1, 9, device=self.base.device)[None]).logits
        if not usable(out):
            raise not_finite(arm)
        return out

    def _admit(self) -> list[Row]:
        joined: list[Row] = []
        longest = 0
        while self.waiting and len(self.running) < self.slots:
            longest = max(longest, len(self.waiting[0].prompt))
            if joined and longest * (len(joined) + 1) > PREFILL_TOKENS:
                break
            s = self.waiting.popleft()
            joined.append(s)
            self.running.append(s)
            self.cache.lengths.append(0)
        return joined

    def _leave(self, slot: int) -> None:
        if self.running[slot].finished == "failed":
            self.cache.wipe(slot)
        self.cache.drop(slot)
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last

    def _forward(self, rows: Sequence[Row], first: int, starts: list[int], ids: Tensor, counts: list[int]) -> Tensor:
        """Logits (B, V) float32 after each row's last new token."""
        self.cache.begin(first, starts, ids, counts)
        device = ids.device
        positions = self.cache.starts[:, None] + torch.arange(ids.shape[1], device=device)
        call: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": self._mask(positions),
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if self.applied is None:
            hidden = self.decoder(**call).last_hidden_state
        else:
            with self.applied.rows([s.arm for s in rows], [s.strength for s in rows], [s.params for s in rows]):
                hidden = self.decoder(**call).last_hidden_state
        last = torch.tensor(counts, device=device) - 1
        return self._logits(hidden[torch.arange(len(rows), device=device), last])

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _mask(self, positions: Tensor) -> Any:
        """(B, 1, T, K) bool: key k may be seen from position p if k <= p. A dict for models with sliding layers."""
        k = torch.arange(self.cache.columns, device=positions.device)
        full = (k <= positions[:, :, None])[:, None]
        if self.window is None:
            return full
        near = (k > positions[:, :, None] - self.window)[:, None]
        return {"full_attention": full, "sliding_attention": full & near}

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[int | None]:
        """A token for each row; None for a row that has none, which fails alone."""
        for b, s in enumerate(rows):
            for token, add in s.bias.items():
                logits[b, token] += add
        highest, at = logits.max(-1)  # of NaN and something the highest is NaN
        greedy, best_of = at.tolist(), highest.tolist()
        out: list[int | None] = []
        for b, s in enumerate(rows):
            if not math.isfinite(best_of[b]):
                fail(s, not_finite(s.arm))
                out.append(None)
                continue
            try:
                token = greedy[b] if s.temperature < COLD else _sample(logits[b], s)
                if s.logprobs is not None:
                    scores = logits[b].log_softmax(-1)
                    top = scores.topk(min(s.logprobs, len(scores))) if s.logprobs else None
                    best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True)) if top else []
                    s.scores.append((float(scores[token]), best))
                out.append(token)
            except (RuntimeError, ValueError, OverflowError) as e:
                log.exception("a draw failed")
                how = f"temperature {s.temperature:g} and top_p {s.top_p:g}"
                fail(s, Failed(f"No token can be drawn with {how} ({e})."))
                out.append(None)
        return out


def _sample(logits: Tensor, s: Row) -> int:
    """One token from softmax(logits / temperature) cut to mass top_p, drawn by the row's own generator."""
    if s.generator is None:
        s.generator = torch.Generator().manual_seed(s.seed) if s.seed is not None else torch.Generator()
        if s.seed is None:
            s.generator.seed()
    p = (logits.cpu() / s.temperature).softmax(-1)
    if s.top_p < 1.0:
        ordered, at = p.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > s.top_p] = 0.0
        return int(at[torch.multinomial(ordered, 1, generator=s.generator)])
    return int(torch.multinomial(p, 1, generator=s.generator))
