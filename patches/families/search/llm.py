"""A language model of this process as the generator: one row decoded per candidate, prompts shared as keys.

A prompt is a fixed head (what the task is, one example), which is run once and kept as keys and values, then the item's
best lines with their scores, worst first, then the beginning of a line with a better score: the model writes the rest
of that line. All R rows of an item start from one copy of its keys; rows of all items decode in one batch, each with
its own random numbers, and leave when their line ends.

`Stream` is the published form instead: one row a round, which writes a numbered list of R lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patches.engine.patch import Applied
from patches.families.base import Base
from patches.families.llm.cache import SlotCache
from patches.families.llm.worker import Decoder, Row
from patches.families.search.config import SearchConfig
from patches.families.search.generators import Asked, Generator, Proposal, Proposing
from patches.families.search.parse import candidate, candidates
from patches.families.search.track import Candidate

ROWS = 64
"""rows decoded at once; more items wait their turn. A row of SmolLM2 holds 46 kB of keys a token"""
LINE_TOKENS = 24
"""tokens of the longest line"""

HEADS = {
    "caption": (
        "Descriptions of pictures, each with a score that says how well it fits its picture. The scores of a list "
        "rise, because each line keeps what was right in the lines before it and changes what was wrong.\n\n"
        "List 1\n0.212: a picture of a cat on wood\n0.305: a picture of a kitten and a ball\n"
        "0.338: a picture of a kitten on grass\n0.421: a picture of a kitten and a red ball on grass\n\nList 2\n"
    ),
    "prompt": (
        "Prompts for a program that draws, each with a score that says how well its drawing shows what was wanted. The "
        "scores of a list rise, because each line keeps what was right in the lines before it.\n\n"
        "Wanted: a dog at sea\n0.212: a dog\n0.305: a dog near water\n0.421: a picture of a dog on water\n\n"
    ),
}
"""what every prompt of a kind of task begins with: run once, kept as keys"""


def head(config: SearchConfig) -> str:
    return HEADS["prompt" if config.task in ("prompt", "style") else "caption"]


def tail(asked: Asked, config: SearchConfig) -> str:
    """The item's own part of the prompt: its best lines, best last, and a score above them."""
    lines = list(asked.kept[: config.shown])[::-1]
    wanted = f"Wanted: {asked.goal}\n" if asked.goal else ""
    return wanted + "".join(f"{s}: {c.text}\n" for s, c in zip(shown(lines, config), lines, strict=True)) + better(
        lines, config
    )  # fmt: skip


def shown(lines: Sequence[Candidate], config: SearchConfig) -> list[str]:
    """Scores as the model reads them."""
    if config.scores == "rank":
        return [f"{(i + 1) / (len(lines) + 1):.3f}" for i in range(len(lines))]
    return [f"{c.score:.3f}" for c in lines]


def better(lines: Sequence[Candidate], config: SearchConfig) -> str:
    """The beginning of the line that is asked for."""
    if config.scores == "rank":
        return "1.000:"
    return f"{lines[-1].score + 0.03:.3f}:"


class LanguageModel(Generator):
    """The base of role `generator`; with a patch if it carries one."""

    def __init__(self, base: Base, applied: Applied | None = None, arm: str | None = None) -> None:
        self.base, self.applied, self.arm = base, applied, arm
        self.decoder = Decoder(base, applied, slots=ROWS)
        self.heads: dict[str, SlotCache] = {}
        """text of a head -> its keys, in slot 0"""

    def propose(self, asked: Sequence[Asked], config: SearchConfig) -> Proposing:
        if config.how == "official":
            return Stream(self, asked, config)
        return Rows(self, asked, config)

    def encode(self, text: str, first: bool) -> list[int]:
        """Tokens of a text; `first`: with what begins every input."""
        return list(self.base.processor(text, add_special_tokens=first)["input_ids"])

    @torch.inference_mode()
    def head(self, text: str) -> SlotCache:
        if text not in self.heads:
            ids = self.encode(text, True)
            cache = self._cache()
            cache.lengths.append(0)
            self._forward(cache, [0], torch.tensor([ids]), [len(ids)])
            cache.lengths[0] = len(ids)
            self.heads = {text: cache}
        return self.heads[text]

    def _cache(self) -> SlotCache:
        self.decoder.reset()
        return self.decoder.cache

    def _forward(self, cache: SlotCache, starts: list[int], ids: Tensor, counts: list[int]) -> Tensor:
        """Logits (B, V) float32 after each row's last new token."""
        self.decoder.cache = cache
        rows = [Row([0], arm=self.arm) for _ in counts]
        return self.decoder._forward(rows, 0, starts, ids.to(self.base.device), counts)


def copied(source: SlotCache, slots: Sequence[int], columns: int, fresh: SlotCache) -> SlotCache:
    """`fresh` with slot i holding what slot slots[i] of `source` holds, with room for `columns` tokens."""
    fresh._reserve(len(slots), columns)
    index = torch.tensor(list(slots), device=fresh.device)
    longest = max(source.lengths[s] for s in slots)
    for new, old in ((fresh.keys, source.keys), (fresh.values, source.values)):
        for layer in range(len(new)):
            new[layer][: len(slots), :, :longest] = old[layer][index, :, :longest]
    fresh.ids[: len(slots), :longest] = source.ids[index, :longest]
    fresh.lengths = [source.lengths[s] for s in slots]
    return fresh


@dataclass
class Line:
    """One candidate being decoded."""

    item: int
    generator: torch.Generator
    out: list[int] = field(default_factory=list)


class Rows(Proposing):
    """R rows an item, in groups of items that fill ROWS; one forward a slice."""

    def __init__(self, model: LanguageModel, asked: Sequence[Asked], config: SearchConfig) -> None:
        self.model, self.asked, self.config = model, asked, config
        self.lines: list[list[str]] = [[] for _ in asked]
        self.tokens = [0] * len(asked)
        self.dropped: set[int] = set()
        self.todo = [i for i, a in enumerate(asked) if a.want > 0]
        self.running: list[Line] = []
        self.cache: SlotCache | None = None
        self.newline = _ends_line(model)

    def advance(self) -> bool:
        with torch.inference_mode():
            if self.running:
                self._decode()
            elif self.todo:
                self._prefill()
        return not self.running and not self.todo

    def _prefill(self) -> None:
        """The tails of a group of items behind the head's keys, then a row for every candidate."""
        group: list[int] = []
        while self.todo and (not group or sum(self.asked[i].want for i in (*group, self.todo[0])) <= ROWS):
            group.append(self.todo.pop(0))
        group = [i for i in group if i not in self.dropped]
        if not group:
            return
        model, cache = self.model, self.model.head(head(self.config))
        ids = [model.encode(tail(self.asked[i], self.config), False) for i in group]
        start, longest = cache.lengths[0], max(map(len, ids))
        prompts = copied(cache, [0] * len(group), start + longest + 1, model._cache())
        padded = torch.zeros(len(group), longest, dtype=torch.long)
        for row, tokens in zip(padded, ids, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        counts = [len(t) for t in ids]
        logits = model._forward(prompts, [start] * len(group), padded, counts)
        prompts.lengths = [start + n for n in counts]
        slots = [k for k, i in enumerate(group) for _ in range(self.asked[i].want)]
        self.cache = copied(prompts, slots, start + longest + LINE_TOKENS, model._cache())
        self.running = [
            Line(group[k], torch.Generator().manual_seed(self.asked[group[k]].rng.getrandbits(63))) for k in slots
        ]
        for i, n in zip(group, counts, strict=True):
            self.tokens[i] += n
        self._take(logits[slots])

    def _decode(self) -> None:
        assert self.cache is not None
        ids = torch.tensor([[line.out[-1]] for line in self.running])
        starts = list(self.cache.lengths)
        logits = self.model._forward(self.cache, starts, ids, [1] * len(self.running))
        self.cache.lengths = [s + 1 for s in starts]
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        """Draw a token for every row; rows whose line has ended leave."""
        assert self.cache is not None
        drawn = sample(logits, [line.generator for line in self.running], self.config)
        for slot in reversed(range(len(self.running))):
            line, token = self.running[slot], drawn[slot]
            line.out.append(token)
            self.tokens[line.item] += 1
            if self.newline[token] or len(line.out) >= LINE_TOKENS or line.item in self.dropped:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        assert self.cache is not None
        line = self.running[slot]
        text = str(self.model.base.processor.decode(line.out, skip_special_tokens=True)).partition("\n")[0]
        if made := candidate(text, self.config.words):
            self.lines[line.item].append(made)
        self.cache.drop(slot)
        last = self.running.pop()
        if slot < len(self.running):
            self.running[slot] = last

    def results(self) -> list[Proposal]:
        return [Proposal(tuple(dict.fromkeys(lines)), n) for lines, n in zip(self.lines, self.tokens, strict=True)]

    def drop(self, index: int) -> None:
        self.dropped.add(index)


class Stream(Proposing):
    """The published form: one chat a round and item that writes a numbered list, one item after the other."""

    def __init__(self, model: LanguageModel, asked: Sequence[Asked], config: SearchConfig) -> None:
        self.model, self.config = model, config
        self.rows = []
        for a in asked:
            text = model.base.processor.apply_chat_template(
                [{"role": "user", "content": instruction(a, config)}], tokenize=False, add_generation_prompt=True
            )
            self.rows.append(Row(
                model.encode(text, False), arm=model.arm, max_tokens=min(3000, LINE_TOKENS * max(1, a.want)),
                temperature=config.temperature, top_p=config.top_p, seed=a.rng.getrandbits(63),
            ))  # fmt: skip
        self.todo = list(self.rows)
        model.decoder.reset()

    def advance(self) -> bool:
        decoder = self.model.decoder
        if decoder.idle and self.todo:
            decoder.add([self.todo.pop(0)])
        if not decoder.idle:
            decoder.step()
        return decoder.idle and not self.todo

    def results(self) -> list[Proposal]:
        decode = self.model.base.processor.decode
        texts = [candidates(str(decode(r.out, skip_special_tokens=True)), self.config.words) for r in self.rows]
        return [Proposal(tuple(t), len(r.out) + len(r.prompt)) for t, r in zip(texts, self.rows, strict=True)]

    def drop(self, index: int) -> None:
        row = self.rows[index]
        if row in self.todo:
            self.todo.remove(row)
        else:
            self.model.decoder.cancel(row)

    def close(self) -> None:
        self.model.decoder.reset()


def instruction(asked: Asked, config: SearchConfig) -> str:
    """The prompt of one round for a model that follows instructions (`Stream`, endpoints)."""
    what = {
        "video": "a video clip", "audio": "a sound", "prompt": "a drawing program", "style": "a picture editor",
        "arithmetic": "a combination of pictures and words",
    }.get(config.task, "a picture")  # fmt: skip
    lines = "\n".join(f"{s}: {c.text}" for s, c in zip(shown(asked.kept, config), asked.kept, strict=True))
    if config.task in ("prompt", "style"):
        aim = f"You write prompts for {what}." + (f" What is wanted: {asked.goal}." if asked.goal else "")
    else:
        aim = f"You describe {what} that you cannot see."
    return (
        f"{aim} Below are attempts with scores; a higher score fits better.\n\n{lines}\n\n"
        f"Write {asked.want} new lines that would score higher. Keep what the best ones share, combine them, change or "
        f"leave out what does not help, and add concrete things. Use at most {config.words} words a line, one line "
        "each, numbered 1., 2., 3. and so on, and write nothing else."
    )


def sample(logits: Tensor, generators: Sequence[torch.Generator], config: SearchConfig) -> list[int]:
    """One token a row from softmax(logits / temperature) cut to mass top_p, by the row's own random numbers.

    Only the 256 likeliest tokens are looked at, which sorts two orders of magnitude less than the vocabulary.
    """
    if config.temperature == 0.0:
        return [int(i) for i in logits.argmax(-1).tolist()]
    top, at = (logits.float().cpu() / config.temperature).topk(min(256, logits.shape[-1]))
    p = top.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p > config.top_p, 0.0)
    picked = [int(torch.multinomial(row, 1, generator=g)) for row, g in zip(p, generators, strict=True)]
    return [int(at[b, i]) for b, i in enumerate(picked)]


def _ends_line(model: LanguageModel) -> Any:
    """(V,) which tokens end a line: those whose text holds a line feed, and the end marks."""
    if not hasattr(model, "_newline"):
        tokenizer, size = model.base.processor, model.base.model.config.vocab_size
        ends = [False] * size
        for text, token in tokenizer.get_vocab().items():
            if token < size and ("\u010a" in text or "\n" in text):  # byte-level vocabularies write a line feed so
                ends[token] = True
        for token in model.decoder.stops:
            if token is not None and token < size:
                ends[token] = True
        model._newline = ends  # type: ignore[attr-defined]
    return model._newline  # type: ignore[attr-defined]
