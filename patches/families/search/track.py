"""The search of one item: its candidates, its rounds, when it ends; and the trace that all of it is restored from.

A trace is a list of records, one a round, JSON-able. Record 0 holds the scores of the bank's lines in their order;
record k the new candidates of round k with their scores, and the hash of the kept lines they were made from. Replaying
the records gives the state bit for bit, so a search that was killed goes on as if it had not been: scores are rounded
to DIGITS before anything is decided by them, and every random draw is seeded by (seed, item, round).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from patches.families.search.bank import Bank
from patches.families.search.config import SearchConfig
from registry.errors import BadArtifact

DIGITS = 6
"""Digits of a score that count; what differs less is float noise of the batch a text was encoded in"""
BARREN = 3
"""rounds in which the generator gave nothing new, after which a search ends"""
Why = Literal["steps", "patience", "seconds", "calls", "tokens", "barren"]


class Candidate(NamedTuple):
    """A text that was scored."""

    text: str
    score: float
    step: int
    """the round it was made in; 0 for the bank"""
    parents: str
    """hash of the kept lines it was made from; "" for the bank"""


@dataclass
class Track:
    """The state of one item. `begin` or `restore` first, then `kept`, `fresh` and `add` once a round."""

    config: SearchConfig
    bank: Bank
    key: str = "0"
    """with the seed: what the item's random draws depend on"""
    start: tuple[str, ...] = ()
    """lines of the request's own that are scored with the bank, such as the prompt to be rewritten"""
    found: dict[str, Candidate] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    best: Candidate | None = None
    stale: int = 0
    """rounds since the best got better"""
    barren: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """measured, of all runs together"""

    @property
    def step(self) -> int:
        """The round that comes next; 0: the bank is not scored yet."""
        return len(self.trace)

    @property
    def calls(self) -> int:
        return len(self.found)

    @property
    def first(self) -> tuple[str, ...]:
        """What round 0 scores: own lines, then the bank's; the same for every budget but that of lines, so that a
        search ends no lower than the best of its bank."""
        return tuple(dict.fromkeys((*self.start, *self.bank.lines[: self.config.lines or None])))

    @property
    def candidates(self) -> int:
        """Texts scored after round 0, which the budget of calls bounds."""
        return self.calls - len(self.first) if self.trace else 0

    @property
    def why(self) -> Why | None:
        """Why the search has ended; None: it goes on."""
        c = self.config
        if not self.trace:
            return None
        if self.step > c.steps:
            return "steps"
        if c.patience and self.stale >= c.patience:
            return "patience"
        for name, used in (("seconds", self.seconds), ("calls", self.candidates), ("tokens", self.tokens)):
            if getattr(c, name) and used >= getattr(c, name):
                return name  # type: ignore[return-value]
        return "barren" if self.barren >= BARREN else None

    @property
    def room(self) -> int:
        """Candidates the next round may have."""
        c = self.config
        return min(c.ask, c.calls - self.candidates) if c.calls else c.ask

    def rng(self, what: str = "") -> random.Random:
        """Random numbers of the coming round, for one purpose."""
        seed = hashlib.sha256(f"{self.config.seed}/{self.key}/{self.step}/{what}".encode()).digest()
        return random.Random(int.from_bytes(seed[:8], "big"))

    def kept(self) -> list[Candidate]:
        """The K candidates the next round is made from, best first; of equals the older. A share epsilon of them is
        drawn from those below (exploration)."""
        ranked = sorted(self.found.values(), key=lambda c: -c.score)  # stable: insertion order breaks ties
        explore = min(round(self.config.epsilon * self.config.keep), max(0, len(ranked) - self.config.keep))
        top, below = ranked[: self.config.keep - explore], ranked[self.config.keep - explore :]
        drawn = self.rng("explore").sample(range(len(below)), explore) if explore else []
        return top + [below[i] for i in sorted(drawn)]

    def fresh(self, texts: Iterable[str]) -> list[str]:
        """The texts that were not scored yet, each once, as many as the round has room for."""
        new = [t for t in dict.fromkeys(texts) if t not in self.found]
        return new[: max(0, self.room)]

    def begin(self, scores: Sequence[float], seconds: float = 0.0) -> None:
        """Round 0: the scores of `first`."""
        self._replay({"step": 0, "bank": self.bank.digest, "start": list(self.start), "seconds": round(seconds, 3),
                      "scores": [round(float(s), DIGITS) for s in scores]})  # fmt: skip

    def add(
        self, kept: Sequence[Candidate], texts: Sequence[str], scores: Sequence[float], tokens: int = 0,
        seconds: float = 0.0, problem: str = "",
    ) -> None:  # fmt: skip
        """One round: what it was made from, what came and how it scored. problem: what was wrong with the generator."""
        new = [[t, round(float(s), DIGITS)] for t, s in zip(texts, scores, strict=True)]
        record = {"step": self.step, "parents": parents(kept), "new": new, "tokens": tokens}
        self._replay({**record, "seconds": round(seconds, 3), **({"problem": problem} if problem else {})})

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replay a trace. Raises BadArtifact for one of another bank or with a hole in it."""
        for record in records:
            if record.get("step") != self.step:
                raise BadArtifact(f"The trace has round {record.get('step')!r} where {self.step} should be.")
            if record["step"] == 0 and record["bank"] != self.bank.digest:
                raise BadArtifact(
                    f"The trace was begun with the bank {record['bank'][:16]}, not {self.bank.digest[:16]}."
                )
            self._replay(dict(record))

    def _replay(self, record: dict[str, Any]) -> None:
        step, before = self.step, self.best
        if step == 0:
            pairs, made_from = zip(self.first, record["scores"], strict=True), ""
        else:
            pairs, made_from = iter(record["new"]), record["parents"]
            self.barren = 0 if record["new"] else self.barren + 1
        for text, score in pairs:
            one = self.found[text] = Candidate(text, score, step, made_from)
            if self.best is None or one.score > self.best.score:
                self.best = one
        self.stale = 0 if before is not self.best else self.stale + 1
        self.tokens += record.get("tokens", 0)
        self.seconds += record.get("seconds", 0.0)
        self.trace.append(record)

    def curve(self) -> list[float]:
        """The best score after each round; never falls."""
        best, out = -float("inf"), []
        for record in self.trace:
            scores = record["scores"] if record["step"] == 0 else [s for _, s in record["new"]]
            best = max([best, *scores])
            out.append(best)
        return out


def parents(kept: Sequence[Candidate]) -> str:
    """16 hex digits of the lines a round was made from, in their order."""
    return hashlib.sha256("\n".join(c.text for c in kept).encode()).hexdigest()[:16]


def digest(trace: Iterable[Mapping[str, Any]]) -> str:
    """64 hex digits of a trace, without what a clock measured."""
    plain = [{k: v for k, v in record.items() if k != "seconds"} for record in trace]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
