"""Generators: what proposes new candidates from the kept ones. Here the contract, and the two that need no model.

A generator is asked for many items at once and works in bounded slices (`Proposing.advance`, well under a second), so
that whoever drives it can cancel between them.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from patches.families.search.bank import JOINTS, Bank, joint, phrases, shape
from patches.families.search.config import SearchConfig
from patches.families.search.track import Candidate

TRIES = 12
"""mutations tried for one candidate before fewer are given"""


@dataclass(frozen=True)
class Asked:
    """What one item wants of a generator in one round."""

    kept: Sequence[Candidate]
    """best first; never empty"""
    want: int
    rng: random.Random
    seen: frozenset[str] | dict[str, Candidate]
    """texts that were scored already"""
    goal: str = ""
    """the prompt that is being rewritten; "" for captions"""


@dataclass(frozen=True)
class Proposal:
    """What came for one item."""

    texts: tuple[str, ...] = ()
    tokens: int = 0
    problem: str = ""
    """what was wrong, in words; the round goes on with the texts there are"""
    down: bool = False
    """the generator cannot be reached at all"""


class Proposing(ABC):
    """A batch of proposals that is being made."""

    @abstractmethod
    def advance(self) -> bool:
        """One bounded slice of work; True once all is done."""

    @abstractmethod
    def results(self) -> list[Proposal]:
        """What came, one an item asked for, in order; also before the end."""

    def drop(self, index: int) -> None:  # noqa: B027
        """Item `index` is no longer wanted. May be ignored."""

    def close(self) -> None:  # noqa: B027
        """Stop; nobody will ask for results."""


class Generator(ABC):
    """Proposes candidates. One belongs to one thread."""

    @abstractmethod
    def propose(self, asked: Sequence[Asked], config: SearchConfig) -> Proposing: ...


@dataclass
class Ready(Proposing):
    """Proposals that were cheap enough to be made at once."""

    made: list[Proposal]

    def advance(self) -> bool:
        return True

    def results(self) -> list[Proposal]:
        return self.made


@dataclass
class Mutation(Generator):
    """New lines from kept ones without any model: swap, insert, drop and recombine the bank's phrases.

    Parents are drawn by rank (the best of two draws), material half of the time from the kept lines, half from the
    bank; a line must have a shape (sequence of joints) that some line of the bank has, or a scorer's blind spots are
    found before captions are. The baseline a language model must beat, and what tests run.
    """

    bank: Bank

    def propose(self, asked: Sequence[Asked], config: SearchConfig) -> Proposing:
        return Ready([Proposal(tuple(self._item(a, config))) for a in asked])

    def _item(self, a: Asked, config: SearchConfig) -> list[str]:
        pool = [c.text for c in a.kept]
        out: dict[str, None] = {}
        for _ in range(a.want * TRIES):
            if len(out) == a.want:
                break
            text = mutate(pool, self.bank, a.rng, config.words)
            if text and text not in a.seen:
                out[text] = None
        return list(out)


@dataclass
class Random(Generator):
    """New lines put together from the bank's phrases at random, whatever the scores say: the control of a search. Of a
    prompt that is rewritten, every line is an edit of the prompt itself."""

    bank: Bank

    def propose(self, asked: Sequence[Asked], config: SearchConfig) -> Proposing:
        return Ready([Proposal(tuple(self._item(a, config))) for a in asked])

    def _item(self, a: Asked, config: SearchConfig) -> list[str]:
        out: dict[str, None] = {}
        for _ in range(a.want * TRIES):
            if len(out) == a.want:
                break
            text = mutate((a.goal,) if a.goal else self.bank.lines, self.bank, a.rng, config.words)
            if text and text not in a.seen:
                out[text] = None
        return list(out)


def mutate(pool: Sequence[str], bank: Bank, rng: random.Random, words: int) -> str:
    """One new line from lines of `pool` (best first) and phrases of the bank; "" if it came out in no shape that lines
    of the bank have, says a thing twice, or is too long."""
    parent = phrases(_ranked(pool, rng))
    other = phrases(_ranked(pool, rng)) if rng.random() < 0.5 else phrases(bank.lines[rng.randrange(len(bank.lines))])
    what = rng.random()
    if what < 0.45:  # swap a phrase for another that begins alike
        i = rng.randrange(len(parent))
        parent[i] = _like(parent[i], other, bank, rng)
    elif what < 0.65:  # insert a phrase behind another; what stood behind "of" comes to stand behind "and"
        more = other[1:] or other
        parent.insert(rng.randint(1, len(parent)), _joined(more[rng.randrange(len(more))]))
    elif what < 0.85:  # head of one line, tail of another
        parent = parent[: rng.randint(1, len(parent))] + other[rng.randint(1, len(other)) :]
    elif len(parent) > 1:  # drop a phrase
        parent.pop(rng.randrange(1, len(parent)))
    line = " ".join(parent)
    things = [p.partition(" ")[2] if joint(p) else p for p in parent]
    twice = len(set(things)) < len(things)
    return "" if twice or line.count(" ") >= words or shape(line) not in bank.shapes else line


def _ranked(pool: Sequence[str], rng: random.Random) -> str:
    return pool[min(rng.randrange(len(pool)), rng.randrange(len(pool)))]


def _joined(subject: str) -> str:
    first, _, rest = subject.partition(" ")
    return f"and {rest}" if first == "of" and rest else subject if first in JOINTS else f"and {subject}"


def _like(phrase: str, other: Sequence[str], bank: Bank, rng: random.Random) -> str:
    """A phrase with the same joint: out of `other` or of the bank, or what another joint introduces there, so that what
    stands behind "of" can come to stand behind "and"."""
    own = joint(phrase)
    if own in ("of", "and") and rng.random() < 0.5:
        things = [p.partition(" ")[2] for p in other if joint(p) in ("of", "and") and " " in p]
        if things:
            return f"{own} {things[rng.randrange(len(things))]}"
    same = [p for p in other if joint(p) == own] if rng.random() < 0.5 else []
    same = same or list(bank.by_joint.get(own, (phrase,)))
    return same[rng.randrange(len(same))]
