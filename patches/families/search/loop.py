"""The engine: generator -> scorer -> top k -> generator, for many items at once, in slices that end within a second.

All items of a `Searcher` go through a round together: one batch of proposals, one list of texts to encode, whoever they
came from, and features that stay for all items and rounds. `how=official` instead takes one item after the other and
encodes everything again in every round, as the published loop does; with the mutation generator both give the same
trace, so what differs is time alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator as Slices
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from patches.families.search.bank import Bank
from patches.families.search.config import SearchConfig
from patches.families.search.generators import Asked, Generator, Proposal, Proposing
from patches.families.search.scorers import Scorer, Target
from patches.families.search.track import Candidate, Track
from registry.errors import NotReady, PatchbayError


@dataclass(eq=False, kw_only=True)
class Item:
    """What texts are searched for, and how far that is. `Searcher` fills `track`."""

    inputs: Mapping[str, Any]
    """as the scorer's `target` takes them"""
    config: SearchConfig
    """the searcher's, with this item's budgets"""
    key: str = "0"
    """with the seed: what its random draws depend on"""
    start: tuple[str, ...] = ()
    """lines of its own that are scored with the bank"""
    goal: str = ""
    records: Sequence[Mapping[str, Any]] = ()
    """its trace so far, if it was interrupted"""
    track: Track | None = None
    target: Target | None = None
    ended: str | None = None
    """why the search has ended, "cancelled" or "failed"; None: it goes on"""
    error: PatchbayError | None = None
    problem: str = ""
    """what was wrong with the generator in the last round"""
    encoded: float = 0.0
    """share of the texts of its round that are encoded"""


@dataclass
class Spent:
    """What a searcher has done."""

    rounds: int = 0
    proposed: int = 0
    tokens: int = 0
    generating_s: float = 0.0
    scoring_s: float = 0.0


@dataclass
class Searcher:
    """One configuration at work. `add` items, `step` until `idle`. One belongs to one thread."""

    config: SearchConfig
    bank: Bank
    scorer: Scorer
    generator: Generator
    items: list[Item] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._going: Slices[None, None, list[Item]] | None = None
        self._in_round: list[Item] = []
        self._proposing: Proposing | None = None

    @property
    def idle(self) -> bool:
        return not self.items

    def add(self, items: Iterable[Item]) -> None:
        """Begin, or go on from their records. Raises as `Track.restore`, adding none."""
        items = list(items)
        for item in items:
            item.track = Track(item.config, self.bank, item.key, item.start)
            item.track.restore(item.records)
        self.items += items

    def cancel(self, item: Item) -> None:
        """Give an item up; the others do not notice, and a round that nobody wants any more ends here."""
        if item.ended:
            return
        item.ended = "cancelled"
        if item in self.items:
            self.items.remove(item)
        if self._proposing is not None and item in self._in_round:
            self._proposing.drop(self._in_round.index(item))
        if self._going is not None and all(i.ended for i in self._in_round):
            self._abandon()

    def reset(self) -> None:
        """Forget all items; features stay."""
        self._abandon()
        self.items = []

    def _abandon(self) -> None:
        if self._proposing is not None:
            self._proposing.close()
        if self._going is not None:
            self._going.close()
        self._going = self._proposing = None

    def step(self) -> list[Item]:
        """One slice of work. Returns the items whose round it completed, or that ended; mostly none."""
        if self._going is None:
            self._in_round = self._next()
            over = [i for i in self._in_round if self._end(i)]
            if over or not self._in_round:
                return over
            first = any(i.track is not None and i.track.step == 0 for i in self._in_round)
            self._going = self._bank(self._in_round) if first else self._round(self._in_round)
        try:
            next(self._going)
        except StopIteration as done:
            self._going = self._proposing = None
            self.spent.rounds += 1
            touched: list[Item] = [i for i in done.value if i.ended != "cancelled"]
            for item in touched:
                self._end(item)
            return touched
        return []

    def run(self, items: Iterable[Item]) -> None:
        """Search for all of them to the end."""
        self.add(items)
        while not self.idle:
            self.step()

    def _next(self) -> list[Item]:
        """Whose round comes now: those that have no scores of the bank yet, else all; of the official loop, one."""
        if self.config.how == "official":
            return self.items[:1]
        fresh = [i for i in self.items if i.track is not None and i.track.step == 0]
        return fresh or list(self.items)

    def _end(self, item: Item) -> bool:
        assert item.track is not None
        item.ended = item.ended or item.track.why
        if item.ended and item in self.items:
            self.items.remove(item)
        return bool(item.ended)

    # ---- rounds: generators that yield between slices --------------------------------------------------------------

    def _bank(self, items: list[Item]) -> Slices[None, None, list[Item]]:
        """Round 0: the bank's lines, and the items' own, against every item."""
        began = time.monotonic()
        for item in items:
            yield from self._aim(item)
        yield from self._encode([(i, i.track.first) for i in items if i.track is not None and not i.ended])
        for item in items:
            if not item.ended:
                assert item.track is not None
                assert item.target is not None
                item.track.begin(self.scorer.score(item.target, item.track.first), time.monotonic() - began)
        self.spent.scoring_s += time.monotonic() - began
        return items

    def _round(self, items: list[Item]) -> Slices[None, None, list[Item]]:
        """Propose, encode, score, once for all items."""
        began = time.monotonic()
        kept: dict[int, list[Candidate]] = {}
        asked = []
        for item in items:
            assert item.track is not None
            yield from self._aim(item)
            kept[id(item)] = item.track.kept()
            asked.append(Asked(kept[id(item)], item.track.room, item.track.rng(), item.track.found, item.goal))
        proposals = yield from self._propose(items, asked, began)
        middle = time.monotonic()
        new: list[tuple[Item, list[str]]] = []
        for item, proposal in zip(items, proposals, strict=True):
            assert item.track is not None
            if proposal.down:
                item.ended, item.error = (
                    "failed",
                    NotReady(f"{proposal.problem}; the rounds so far are kept.".capitalize()),
                )
            if not item.ended:
                new.append((item, item.track.fresh(proposal.texts)))
        if self.config.how == "official":
            self.scorer.kept.clear()
        again = [(i, [c.text for c in kept[id(i)]]) for i, _ in new] if self.config.how == "official" else []
        yield from self._encode([*new, *again])
        made = {id(item): texts for item, texts in new}
        for item, proposal in zip(items, proposals, strict=True):
            if id(item) in made and not item.ended:
                self._complete(item, kept[id(item)], made[id(item)], proposal, time.monotonic() - began)
        self.spent.generating_s += middle - began
        self.spent.scoring_s += time.monotonic() - middle
        return items

    def _propose(
        self, items: list[Item], asked: list[Asked], began: float
    ) -> Slices[None, None, list[Proposal]]:  # fmt: skip
        proposing = self._proposing = self.generator.propose(asked, self.config)
        late: set[int] = set()
        while not proposing.advance():
            now = time.monotonic() - began
            for index, item in enumerate(items):
                assert item.track is not None
                limit = min(item.config.wait, item.config.seconds - item.track.seconds if item.config.seconds else 1e9)
                if index not in late and now > limit:
                    late.add(index)
                    proposing.drop(index)
            if len(late) == len(items):
                break
            yield
        made = proposing.results()
        proposing.close()
        self._proposing = None
        limit_s = time.monotonic() - began
        return [
            Proposal(p.texts, p.tokens, p.problem or f"the generator was stopped after {limit_s:.1f} s")
            if i in late else p for i, p in enumerate(made)
        ]  # fmt: skip

    def _complete(
        self, item: Item, kept: list[Candidate], texts: list[str], proposal: Proposal, seconds: float
    ) -> None:  # fmt: skip
        assert item.track is not None
        assert item.target is not None
        item.problem = proposal.problem
        item.track.add(kept, texts, self.scorer.score(item.target, texts), proposal.tokens, seconds, proposal.problem)
        self.spent.proposed += len(texts)
        self.spent.tokens += proposal.tokens

    def _aim(self, item: Item) -> Slices[None, None, None]:
        """Make an item's target. What cannot be one fails it alone."""
        if item.target is not None or item.ended:
            return
        try:
            yield from self.scorer.aiming(item.inputs)
            item.target = self.scorer.target(item.inputs)
        except PatchbayError as e:
            item.ended, item.error = "failed", e

    def _encode(self, wanted: Sequence[tuple[Item, Sequence[str]]]) -> Slices[None, None, None]:
        """Encode what is missing, in the scorer's slices, whichever items want it."""
        if self.config.how == "official" and any(i.track is not None and i.track.step == 0 for i, _ in wanted):
            self.scorer.kept.clear()
        by_scope: dict[str, tuple[Target, dict[str, None]]] = {}
        for item, texts in wanted:
            assert item.target is not None
            _, all_texts = by_scope.setdefault(item.target.scope, (item.target, {}))
            all_texts.update(dict.fromkeys(texts))
        missing = [(target, self.scorer.missing(target, list(scoped))) for target, scoped in by_scope.values()]
        before, wanting = self.scorer.encoded, max(1, sum(len(texts) for _, texts in missing))
        for target, texts in missing:
            for _ in self.scorer.filling(target, texts):
                for item, _ in wanted:
                    item.encoded = (self.scorer.encoded - before) / wanting
                yield
