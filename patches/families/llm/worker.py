"""LLM worker: continuous batching of sequences of any arm on one copy of the base.

Keys and values lie in slots, token t of row b in column t, so a sequence joins without moving others (no left padding),
and leaves by letting the last slot take its place. A `Decoder` belongs to one thread. Evaluations, MLflow and the
services all run on it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from patches.engine.isolate import fail, isolate, not_finite, usable
from patches.engine.patch import Applied
from patches.families.base import Base
from patches.families.llm.cache import SlotCache
from patches.families.worker import Job, Worker, spare_bytes
from registry.errors import Failed, Invalid, TooLong

# transformers renames this argument in 5.40, which pyproject.toml excludes; before that it warns at every call
warnings.filterwarnings("ignore", message=".*past_key_values. is deprecated", category=FutureWarning)

log = logging.getLogger("patchbay")

PREFILL_TOKENS = 2048
"""Largest number of padded prompt tokens in one forward; a longer prompt is prefilled in parts, between which running
rows go on"""
SCORED_TOKENS = 128
"""Number of prompt tokens whose logits over the whole vocabulary are in memory at once"""
COLD = 1e-4
"""Temperature below which the most likely token is taken, because logits divided by less overflow float32"""


@dataclass(eq=False)
class Row(Job):
    """One sequence being decoded; `Decoder` fills `out`."""

    prompt: list[int]
    """Token ids"""
    max_tokens: int = 16
    """Largest number of generated tokens; 0: the prompt is only read"""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy"""
    top_p: float = 1.0
    """Probability mass of the most likely tokens that sampling is restricted to"""
    seed: int | None = None
    """Seed of the row's own generator; None: random"""
    logprobs: int | None = None
    """Number of alternatives to report beside each token; None: no log-probabilities"""
    bias: dict[int, float] = field(default_factory=dict)
    """Token id -> value added to its logit"""
    ignore_eos: bool = False
    """Whether to go on after an end-of-sequence token"""
    score_prompt: bool = False
    """Whether to report log-probabilities of the prompt's tokens, too"""
    pool: bool = False
    """Whether to sum the prompt's hidden states into `pooled`"""
    out: list[int] = field(default_factory=list)
    """Generated token ids"""
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    """Per generated token: its log-probability (before temperature), and the most likely alternatives"""
    prompt_scores: list[tuple[float, list[tuple[int, float]]] | None] = field(default_factory=list)
    """Per prompt token: the same; None for the first, which has no predecessor"""
    pooled: Tensor | None = None
    """(D,) float32 sum of the prompt's last hidden states"""
    generator: torch.Generator | None = None
    """Generator of the row's samples"""


class Decoder(Worker[Row]):
    """Running batch of sequences: `add` them, then call `step` until `idle`."""

    @classmethod
    def of(cls, subject: Any, settings: Any) -> Self:
        """Create the worker of a subject, as `Family.worker` wants it."""
        places = _places(subject.base.model)
        spare = [int(spare_bytes(at) * len(places) / places.count(at)) for at in set(places)]
        room = settings.kv_bytes or min(spare, default=spare_bytes(subject.base.device))
        return cls(subject.base, subject.applied, settings.slots, settings.context, room)

    def __init__(
        self, base: Base, applied: Applied | None = None, slots: int = 32, context: int | None = None,
        kv_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Create an empty batch.

        slots: largest number of rows; context: limit on prompt and answer together, in tokens; kv_bytes: limit on the
        bytes of all keys and values, for which rows wait.
        """
        self.kv_bytes = kv_bytes
        config = base.model.config.get_text_config()  # the language part of a vision-language model
        self.base, self.applied, self.slots = base, applied, slots
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        """Largest number of tokens of prompt and answer together"""
        layers = getattr(config, "layer_types", None) or ()
        self.mixed = bool(layers)
        """Whether layers differ in what they attend to; if not, all of them use the window"""
        self.window = getattr(config, "sliding_window", None) if "sliding_attention" in layers or not layers else None
        self.cap = getattr(config, "final_logit_softcapping", None)
        """Gemma 2's soft cap on logits; read once, because config attributes are slow"""
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        """Factor of the logits: Cohere's logit_scale, or the inverse of Granite's logits_scaling"""
        self.adds = getattr(config, "_attn_implementation", "") == "eager"
        """Whether masks are numbers added to attention scores (eager attention), not booleans"""
        self.filling: Row | None = None
        """Row whose prompt is being prefilled in parts"""
        self.filled = False
        """Whether the last step prefilled such a part"""
        self.reset()
        if kv_bytes is not None:
            self.context = min(self.context, max(1, kv_bytes // self.cache.token_bytes))
        model = base.model
        eos = model.generation_config.eos_token_id  # type: ignore[union-attr]
        self.stops = {base.processor.eos_token_id, *([eos] if isinstance(eos, int) else eos or [])}
        self.decoder = model.get_decoder()  # type: ignore[operator]
        self.head = model.get_output_embeddings()  # type: ignore[operator]
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        """Number of token embeddings; a tokenizer may know more ids"""

    def reset(self) -> None:
        """Drop everything queued, running and cached."""
        model, config = self.base.model, self.base.model.config.get_text_config()
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        places = _places(model)
        several = places if len(set(places)) > 1 else ()
        self.cache = SlotCache(
            config.num_hidden_layers, heads, width, model.dtype, self.base.device, self.kv_bytes, several  # type: ignore[arg-type]
        )  # fmt: skip
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        """Active rows: running[i] occupies slot i"""
        self.filling = None

    def check(self, sequences: Iterable[Row]) -> None:
        """Check sequences before they are added.

        Raises TooLong if one does not fit the context, Invalid for a token id without an embedding (on a GPU one such
        id would end all sequences).
        """
        for s in sequences:
            need = len(s.prompt) + s.max_tokens
            if not s.prompt or need > self.context:
                raise TooLong(
                    f"The prompt has {len(s.prompt)} tokens and max_tokens is {s.max_tokens}; together they must be "
                    f"between 1 and {self.context}. Shorten the prompt or lower max_tokens."
                )
            if s.max_tokens < 0:
                raise Invalid(f"max_tokens is {s.max_tokens}; 0 reads the prompt alone.")
            for token in (max(s.prompt), min(s.prompt), *s.bias):
                if not 0 <= token < self.vocabulary:
                    raise Invalid(
                        f"Token {token} is beyond the vocabulary of {self.vocabulary} of {self.base.name}, though its "
                        "tokenizer may know it. Leave out the text that becomes it."
                    )

    @torch.inference_mode()
    def cancel(self, sequence: Row) -> None:
        """Stop one sequence now, without effect on the others."""
        if sequence.finished:
            return
        sequence.finished = "cancelled"
        if sequence in self.running:
            self._leave(self.running.index(sequence))
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Run one forward: prefill waiting sequences if there is room, else decode one token for all running ones.

        Returns the sequences that got a token or failed; the finished ones among them have left the batch. A sequence
        that makes the forward raise, or whose logits are not finite, fails alone.
        """
        rows = self._admit()
        joining = bool(rows) or (self.filling is not None and not (self.filled and len(self.running) > 1))
        if not rows and joining:
            rows = [s for s in self.running if s is self.filling]
        elif not rows:
            rows = [s for s in self.running if s is not self.filling]
        self.filled = joining
        if not rows:
            return []
        slots = {id(s): b for b, s in enumerate(self.running)}
        for some in self._neighbours(rows, slots):
            isolate(some, lambda few: self._advance(few, slots[id(few[0])], joining), self._size)
        for s in reversed(rows):
            if s.finished:
                self._leave(slots[id(s)])
        return [s for s in rows if s is not self.filling]

    @staticmethod
    def _neighbours(rows: list[Row], slots: dict[int, int]) -> list[list[Row]]:
        """Split rows, given in the order of their slots, into runs of neighbouring slots."""
        runs: list[list[Row]] = []
        for s in rows:
            if runs and slots[id(s)] == slots[id(runs[-1][-1])] + 1:
                runs[-1].append(s)
            else:
                runs.append([s])
        return runs

    def _advance(self, rows: Sequence[Row], first: int, joining: bool) -> None:
        """Compute the next token of neighbouring rows in slots first, first + 1, ...

        Nothing is kept if it raises: lengths advance last, and columns beyond them are overwritten.
        """
        starts = self.cache.lengths[first : first + len(rows)]
        if joining:
            parts = [self._part(s, at) for s, at in zip(rows, starts, strict=True)]
            counts = [len(part) for part in parts]
            ids = torch.zeros(len(rows), max(counts), dtype=torch.long)
            for b, part in enumerate(parts):
                ids[b, : counts[b]] = torch.tensor(part)
        else:
            counts = [1] * len(rows)
            ids = torch.tensor([[s.out[-1]] for s in rows])
        logits = self._forward(rows, first, starts, ids.to(self.base.device), counts)
        unfinished = joining and starts[0] + counts[0] < len(rows[0].prompt)
        tokens: list[int | None] = [None] * len(rows) if unfinished else self._choose(rows, logits)
        for b, (s, token) in enumerate(zip(rows, tokens, strict=True)):
            self.cache.lengths[first + b] = starts[b] + counts[b]
            if joining and not unfinished:
                self.filling = None if self.filling is s else self.filling
                s.finished = s.finished or ("length" if s.max_tokens == 0 else None)
            if token is None or s.finished:
                continue
            s.out.append(token)
            if token in self.stops and not s.ignore_eos:
                s.finished = "stop"
            elif len(s.out) >= s.max_tokens:
                s.finished = "length"

    def _part(self, row: Row, start: int) -> list[int]:
        """Return the part of a prompt for this forward; all of it unless it is long."""
        whole = start == 0 and (len(row.prompt) <= PREFILL_TOKENS or self._undivided(row))
        return row.prompt if whole else row.prompt[start : start + PREFILL_TOKENS]

    def _undivided(self, row: Row) -> bool:
        """Return whether a prompt must be prefilled in one forward, however long it is."""
        del row
        return False

    @staticmethod
    def _size(row: Row) -> float:
        """Number of tokens of prompt and answer: the memory a row needs."""
        return len(row.prompt) + len(row.out)

    @staticmethod
    def probe(arm: str | None) -> Row:
        """Return a short row that any model can decode, for health checks."""
        return Row([1, 2, 3], arm=arm, max_tokens=2, ignore_eos=True)

    @torch.inference_mode()
    def proof(self, arm: str | None, strength: float = 1.0) -> Tensor:
        """Compute the logits (1, 8, V) of a fixed input under an arm: bit for bit equal for equal behaviour.

        Raises Failed if they are not finite.
        """
        assert self.applied is not None
        with self.applied.rows([arm], [strength]):
            out: Tensor = self.base.model(input_ids=torch.arange(1, 9, device=self.base.device)[None]).logits
        if not usable(out):
            raise not_finite(arm)
        return out

    def _admit(self) -> list[Row]:
        """Move waiting sequences into free slots, as prefill size and cache memory allow; return them."""
        joined: list[Row] = []
        longest = 0
        columns = max((_columns(s) for s in self.running), default=0)
        while self.waiting and len(self.running) < self.slots:
            s = self.waiting[0]
            longest, columns = max(longest, len(s.prompt)), max(columns, _columns(s))
            long = longest > PREFILL_TOKENS and not self._undivided(s)
            if joined and longest * (len(joined) + 1) > PREFILL_TOKENS:
                break
            if (long and self.filling is not None) or not self.cache.fits(len(self.running) + 1, columns):
                break  # first come, first served: the sequences behind it wait, too
            joined.append(self.waiting.popleft())
            self.running.append(s)
            self.cache.lengths.append(0)
            if long:
                self.filling = s
                break
        return joined

    def _leave(self, slot: int) -> None:
        """Take a finished sequence out of the batch."""
        if self.running[slot].finished == "failed":
            self.cache.wipe(slot)
        self.cache.drop(slot)
        last = self.running.pop()
        if self.filling is not None and self.filling.finished:
            self.filling = None
        if slot < len(self.running):
            self.running[slot] = last

    def _forward(self, rows: Sequence[Row], first: int, starts: list[int], ids: Tensor, counts: list[int]) -> Tensor:
        """Run the decoder and return logits (B, V) float32 after each row's last new token."""
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
        return self._read(rows, hidden, starts, counts)

    def _read(self, rows: Sequence[Row], hidden: Tensor, starts: list[int], counts: list[int]) -> Tensor:
        """Return logits (B, V) after each row's last new token from states (B, T, D); store prompts' scores."""
        for b, s in enumerate(rows):
            if starts[b] < len(s.prompt) and (s.score_prompt or s.pool):
                self._keep(s, hidden[b, : counts[b]], starts[b])
        last = torch.tensor(counts, device=hidden.device) - 1
        return self._logits(hidden[torch.arange(len(rows), device=hidden.device), last])

    def _keep(self, s: Row, states: Tensor, start: int) -> None:
        """Store scores and summed states of the prompt tokens from `start`; a repeated forward overwrites them."""
        if s.pool:
            of = states.float().sum(0)
            s.pooled = of if start == 0 or s.pooled is None else s.pooled + of
        if not s.score_prompt:
            return
        s.prompt_scores = [None, *s.prompt_scores[1 : start + 1]]
        for at in range(0, len(states), SCORED_TOKENS):
            targets = s.prompt[start + at + 1 : start + min(at + SCORED_TOKENS, len(states)) + 1]
            if not targets:
                break
            scores = self._logits(states[at : at + len(targets)]).log_softmax(-1)
            ids = torch.tensor(targets, device=scores.device)
            own = scores.gather(1, ids[:, None])[:, 0]
            if not own.isfinite().all():
                fail(s, not_finite(s.arm))
                return
            s.prompt_scores += zip(own.tolist(), best_of(scores, s.logprobs or 0), strict=True)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head, scale and soft cap to hidden states (..., D): logits (..., V) float32."""
        logits: Tensor = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _mask(self, positions: Tensor) -> Any:
        """Build the causal mask (B, 1, T, K) bool: position p sees key k if k <= p and k is in the layer's window.

        A dict for models whose layers differ; numbers to add for eager attention.
        """
        k = torch.arange(self.cache.columns, device=positions.device)
        full = (k <= positions[:, :, None])[:, None]
        if self.window is None:
            return self._added(full)
        near = (k > positions[:, :, None] - self.window)[:, None]
        if not self.mixed:
            return self._added(full & near)
        return {"full_attention": self._added(full), "sliding_attention": self._added(full & near)}

    def _added(self, mask: Tensor) -> Tensor:
        if not self.adds:
            return mask
        dtype: torch.dtype = self.base.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> list[int | None]:
        """Choose a token for each row; None for one that fails alone (logits not finite, or the draw failed)."""
        for b, s in enumerate(rows):
            for token, add in s.bias.items():
                logits[b, token] += add
        highest, at = logits.max(-1)  # the max of NaN and a number is NaN
        greedy, top = at.tolist(), highest.tolist()
        out: list[int | None] = []
        for b, s in enumerate(rows):
            if not math.isfinite(top[b]):
                fail(s, not_finite(s.arm))
                out.append(None)
                continue
            try:
                token = greedy[b] if s.temperature < COLD else _sample(logits[b], s)
                if s.logprobs is not None:
                    scores = logits[b].log_softmax(-1)
                    s.scores.append((float(scores[token]), best_of(scores[None], s.logprobs)[0]))
                out.append(token)
            except (RuntimeError, ValueError, OverflowError) as e:
                log.exception("a draw failed")
                how = f"temperature {s.temperature:g} and top_p {s.top_p:g}"
                fail(s, Failed(f"No token can be drawn with {how} ({e})."))
                out.append(None)
        return out


def _places(model: Any) -> list[torch.device]:
    """Return the device of each decoder layer."""
    return [next(layer.parameters()).device for layer in model.get_decoder().layers]


def _columns(row: Row) -> int:
    """Return the number of cache columns that a row may come to need."""
    return len(row.prompt) + row.max_tokens


def best_of(scores: Tensor, count: int) -> list[list[tuple[int, float]]]:
    """Return the `count` most likely (id, log-probability) pairs for each row of log-probabilities (n, V)."""
    if not count:
        return [[] for _ in scores]
    top = scores.topk(min(count, scores.shape[-1]))
    return [list(zip(i, v, strict=True)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _sample(logits: Tensor, s: Row) -> int:
    """Sample one token from softmax(logits / temperature) restricted to mass top_p, with the row's own generator."""
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
