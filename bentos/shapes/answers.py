"""Format answers of `generate`: incremental text of each row, whole answers, and chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from bentos.shapes.pieces import Pieces
from patches.families.llm.worker import Row

JOINT = 8
"""Number of the prompt's last tokens with which an answer's first token is decoded"""


@dataclass
class Text:
    """Incrementally decoded text of one row: only whole characters, cut before a stop string."""

    tokenizer: Any
    stops: Sequence[str]
    """Strings at which the text ends"""
    ids: list[int] = field(default_factory=list)
    """Token ids, with the prompt's last ones before them"""
    text: str = ""
    """Everything decoded so far"""
    given: int = 0
    """Number of characters returned by `take` so far"""
    stopped: bool = False
    """Whether a stop string was found"""
    before: Sequence[int] = ()
    """The prompt's last tokens, on which the text of the first one may depend (Llama 2 would lose its space without
    them)"""
    _from: int = 0
    _to: int = 0

    def __post_init__(self) -> None:
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        self.ids = [i for i in self.before if i not in special][-JOINT:]
        self._to = len(self.ids)
        while self._to and self._decode(self._to).endswith("\ufffd"):  # half a character, which the answer may complete
            self._to -= 1

    def push(self, ids: Sequence[int]) -> None:
        """Decode new tokens together with the few before them, since a token's text may depend on its neighbour."""
        self.ids.extend(ids)
        before, now = self._decode(self._to), self._decode(len(self.ids))
        if len(now) > len(before) and not now.endswith("\ufffd"):  # else: half a character; wait for the rest
            self.text += now[len(before) :]
            self._from, self._to = self._to, len(self.ids)
            self._cut()

    def end(self) -> None:
        """Finish decoding: held-back text becomes final."""
        if not self.stopped and self._to < len(self.ids):
            self.text += self._decode(len(self.ids))[len(self._decode(self._to)) :]
            self._cut()

    def take(self, last: bool = False) -> str:
        """Return text not yet returned, except a suffix that may become a stop string."""
        upto = len(self.text)
        if not last and not self.stopped:
            upto -= max((n for s in self.stops for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        piece = self.text[self.given : upto]
        self.given = max(self.given, upto)
        return piece

    def _decode(self, to: int) -> str:
        ids = self.ids[self._from : to]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _cut(self) -> None:
        found = [at for s in self.stops if (at := self.text.find(s)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


@dataclass
class Line:
    """One choice of an answer: a row being decoded, and its text."""

    index: int
    """Index among the answer's choices"""
    prompt: int
    """Number of tokens of the prompt"""
    row: Row
    text: Text
    arm: str
    """Label of the arm that answers"""
    seen: int = 0
    """Number of tokens already converted to text"""

    @property
    def finish(self) -> str | None:
        """Finish reason in OpenAI's words; None while decoding."""
        if self.text.stopped:
            return "stop"
        return "length" if self.row.finished == "length" else "stop" if self.row.finished else None


@dataclass(frozen=True)
class About:
    """Fields that every chunk of an answer repeats."""

    kind: str
    """Kind of request: chat or completion"""
    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def whole(self, lines: list[Line], scores: int | None, echo: bool, pieces: Pieces) -> dict[str, Any]:
        """Build a whole answer from its finished choices."""
        choices = []
        for line in lines:
            text = line.text.text
            one: dict[str, Any] = {"index": line.index, "finish_reason": line.finish, "logprobs": None}
            if self.kind == "chat":
                one["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                one["text"] = (self.echoed(line, pieces) if echo else "") + text
            if scores is not None:
                one["logprobs"] = self.logprobs(*self.scored(line, 0, self.scores_of(line), echo), pieces)
            if len({entry.arm for entry in lines}) > 1:
                one["arm"] = line.arm
            if line.row.told:
                one["patchbay"] = line.row.told
            choices.append(one)
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self.head(name), "choices": choices, "usage": self.usage(lines)}

    def scores_of(self, line: Line) -> int:
        """Tokens of an answer whose scores are told so far: of a completion the end token, too, which is no text."""
        return len(line.row.out) if self.kind == "text" and line.row.finished == "stop" else line.seen

    @staticmethod
    def echoed(line: Line, pieces: Pieces) -> str:
        """Decode the prompt, to be repeated before the answer."""
        return str(pieces.tokenizer.decode(line.row.prompt, skip_special_tokens=True))

    @staticmethod
    def scored(line: Line, start: int, upto: int, echo: bool) -> tuple[list[int], list[Any]]:
        """Return the ids of an answer from `start` and their scores, preceded by the prompt's if it is echoed."""
        row = line.row
        ids, scores = row.out[start:upto], list(row.scores[start:upto])
        return ([*row.prompt, *ids], [*row.prompt_scores, *scores]) if echo else (ids, scores)

    def part(
        self, line: Line, text: str, *, role: bool = False, finish: str | None = None, logprobs: Any = None
    ) -> bytes:
        """Build one server-sent event with new text of a choice."""
        one: dict[str, Any] = {"index": line.index, "finish_reason": finish, "logprobs": logprobs}
        if self.kind == "chat":
            one["delta"] = (
                {"role": "assistant", "content": ""} if role else {"content": text} if text or not finish else {}
            )
        else:
            one["text"] = text
        if line.row.told and (role or (finish and self.kind != "chat")):
            one["patchbay"] = line.row.told
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return b"data: " + orjson.dumps({**self.head(name), "choices": [one]}) + b"\n\n"

    def usage_part(self, lines: list[Line]) -> bytes:
        """Build the last event, with token counts."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return b"data: " + orjson.dumps({**self.head(name), "choices": [], "usage": self.usage(lines)}) + b"\n\n"

    @staticmethod
    def usage(lines: list[Line]) -> dict[str, int]:
        asked = sum(len(line.row.prompt) for line in {line.prompt: line for line in lines}.values())
        made = sum(len(line.row.out) for line in lines)
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}

    def logprobs(self, ids: Sequence[int], scores: Sequence[Any], pieces: Pieces, at: int = 0) -> dict[str, Any]:
        """Format scored tokens as OpenAI's API does. at: number of characters of the text before the first token.

        A prompt's first token, which has no predecessor, gets null.
        """
        if self.kind == "chat":

            def token(i: int, score: float) -> dict[str, Any]:
                return {"token": pieces.text(i), "logprob": score, "bytes": list(pieces.bytes(i))}

            parts = [
                {**token(i, score), "top_logprobs": [token(j, s) for j, s in best]}
                for i, (score, best) in zip(ids, scores, strict=False)
            ]
            return {"content": parts, "refusal": None}
        offsets, raw = [], b""
        for i in ids:
            offsets.append(at + len(raw.decode(errors="ignore")))
            raw += b"" if i in pieces.special else pieces.bytes(i)
        return {
            "tokens": [pieces.name(i) for i in ids],
            "token_logprobs": [one[0] if one else None for one in scores],
            "top_logprobs": [_named(i, one, pieces) if one else None for i, one in zip(ids, scores, strict=False)],
            "text_offset": offsets,
        }


def _named(own: int, scored: tuple[float, list[tuple[int, float]]], pieces: Pieces) -> dict[str, float]:
    """Return name -> log-probability of the most likely tokens and the actual one.

    Names must be distinct: of two tokens with the same text, the less likely one is named by its id.
    """
    score, best = scored
    out: dict[str, float] = {}
    for i, s in [*best, *([] if own in dict(best) else [(own, score)])]:
        name = pieces.name(i)
        out[f"token_id:{i}" if name in out else name] = s
    return out
