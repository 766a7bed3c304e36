"""The engine: monotone, converging, deterministic, the same however items are batched, and after kill -9."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from patches.families.search.bank import bank, phrases, shape
from patches.families.search.config import Budget, SearchConfig
from patches.families.search.generators import Asked, Mutation, Proposal, Random, Ready
from patches.families.search.loop import Item, Searcher
from patches.families.search.track import Candidate, digest
from registry.errors import BadArtifact, ConfigError, Invalid

from .world import BANK, HIDDEN, Hidden, config, items, searcher


def traces(s, made):
    s.run(made)
    return [i.track.trace for i in made]


def digests(s, made):
    return [digest(t) for t in traces(s, made)]


def test_the_best_never_falls_and_the_hidden_text_is_found():
    s = searcher()
    made = items(s)
    s.run(made)
    for item, hidden in zip(made, HIDDEN, strict=True):
        curve = item.track.curve()
        assert curve == sorted(curve)
        assert len(curve) == s.config.steps + 1
        assert set(item.track.best.text.split()) == set(hidden.split())
        assert item.ended == "steps"


def test_mutation_beats_random_lines_at_equal_calls():
    s, r = searcher(steps=5), searcher(generator=Random(BANK), steps=5)
    found, drawn = items(s), items(r)
    s.run(found)
    r.run(drawn)
    assert sum(i.track.best.score for i in found) > sum(i.track.best.score for i in drawn)
    assert all(shape(c) in BANK.shapes for i in found for c in i.track.found)


def test_a_trace_is_the_seeds_and_not_the_batchs():
    """Alone or together, in either order, in the published loop or ours: the same candidates, scores and parents."""
    s = searcher()
    together = digests(s, items(s))
    assert digests(s, items(s)) == together
    alone = []
    for i, hidden in enumerate(HIDDEN):
        one = searcher()
        made = [Item(inputs={"hidden": hidden}, config=one.config, key=str(i))]
        alone += digests(one, made)
    assert alone == together
    official = searcher(how="official")
    assert digests(official, items(official)) == together
    other = searcher(seed=1)
    assert digests(other, items(other)) != together


def test_texts_are_encoded_once_and_by_the_published_loop_again_and_again():
    ours, theirs = Hidden(), Hidden()
    s, o = searcher(ours, steps=3), searcher(theirs, steps=3, how="official")
    s.run(items(s))
    o.run(items(o))
    assert len(ours.log) == len(set(ours.log))
    assert len(theirs.log) > 3 * len(BANK.lines) + len(ours.log) - len(BANK.lines)


def test_a_search_goes_on_from_its_trace_at_any_round():
    s = searcher(steps=6)
    made = items(s)
    whole = traces(s, made)
    for cut in range(7):
        again = searcher(steps=6)
        rest = [
            Item(inputs=i.inputs, config=again.config, key=i.key, records=json.loads(json.dumps(t[:cut])))
            for i, t in zip(made, whole, strict=True)
        ]
        assert digests(again, rest) == [digest(t) for t in whole], cut


def test_a_trace_of_another_bank_or_with_a_hole_is_refused():
    s = searcher(steps=3)
    made = items(s)
    trace = traces(s, made)[0]
    other = Searcher(s.config, bank(["a cat", "a dog"]), Hidden(), Mutation(BANK))
    with pytest.raises(BadArtifact, match="bank"):
        other.add([Item(inputs=made[0].inputs, config=s.config, records=trace)])
    with pytest.raises(BadArtifact, match="round 2 where 1"):
        s.add([Item(inputs=made[0].inputs, config=s.config, records=[trace[0], trace[2]])])


def _run_and_write(file):
    s = searcher(steps=10)
    records = [json.loads(line) for line in Path(file).read_text().splitlines()] if os.path.exists(file) else []
    made = items(s)
    for i, item in enumerate(made):
        item.records = [r["record"] for r in records if r["item"] == i]
    s.add(made)
    kept = [len(item.records) for item in made]
    with open(file, "a") as out:
        while not s.idle:
            s.step()
            lines = [
                json.dumps({"item": i, "record": record})
                for i, item in enumerate(made)
                for record in item.track.trace[kept[i] :]
            ]
            if lines:
                time.sleep(0.02)
                out.write("".join(f"{line}\n" for line in lines))
                out.flush()
                os.fsync(out.fileno())
                kept = [len(item.track.trace) for item in made]


def test_killed_ten_times_it_leaves_the_trace_of_an_undisturbed_run(tmp_path):
    fork = multiprocessing.get_context("fork")
    file, kills = tmp_path / "trace.jsonl", 0
    while True:
        before = file.stat().st_size if file.exists() else 0
        child = fork.Process(target=_run_and_write, args=(file,))
        child.start()
        if kills == 10:
            child.join(60)
            assert child.exitcode == 0
            break
        until = time.monotonic() + 20
        while child.is_alive() and time.monotonic() < until:
            if file.exists() and file.stat().st_size > before:
                break
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        text = file.read_text() if file.exists() else ""
        file.write_text(text[: text.rfind("\n") + 1])  # a line that was cut off is no round
    records = [json.loads(line) for line in file.read_text().splitlines()]
    s = searcher(steps=10)
    made = items(s)
    want = digests(s, made)
    assert [digest([r["record"] for r in records if r["item"] == i]) for i in range(len(made))] == want


@pytest.mark.parametrize(
    ("how", "why"),
    [({"calls": 60}, "calls"), ({"patience": 2, "steps": 40}, "patience"), ({"seconds": 0.0001}, "seconds"),
     ({"steps": 2}, "steps")],
)  # fmt: skip
def test_budgets_end_a_search(how, why):
    s = searcher(**how)
    made = items(s)
    s.run(made)
    assert {i.ended for i in made} == {why}
    if "calls" in how:
        assert all(i.track.candidates == 60 for i in made)


@pytest.mark.parametrize(
    "budget",
    [Budget(calls=1), Budget(calls=5, steps=3), Budget(seconds=0.01), Budget(steps=0), Budget(ask=1), Budget(tokens=1),
     Budget(lines=4, calls=2)],
)  # fmt: skip
def test_no_budget_loses_the_best_line_of_the_bank(budget):
    """A search ends no lower than the base, which is its bank with the same lines; calls count from there."""
    s = searcher()
    made = [replace(i, config=budget.within(s.config)) for i in items(s)]
    base = [replace(i, config=replace(i.config, steps=0)) for i in made]
    s.run(made)
    s.run(base)
    assert all(a.track.best.score >= b.track.best.score for a, b in zip(made, base, strict=True))
    if budget.lines is None:
        assert all(set(BANK.lines) <= set(i.track.found) for i in made)
    if budget.calls is not None:
        assert {i.track.candidates for i in made} == {budget.calls}


def test_random_rewriting_begins_with_the_prompt_and_looks_at_no_score():
    """The control of a prompt's search: its lines keep something of what was asked for."""
    goal = "a picture of a cat on sand"
    asked = [Asked([Candidate("a bee", 9.0, 0, "")], 12, random.Random(k), {}, goal) for k in range(4)]
    for p in Random(BANK).propose(asked, config()).results():
        assert len(p.texts) == 12
        assert all(set(phrases(t)) & set(phrases(goal)) for t in p.texts)


def test_exploration_keeps_some_that_are_not_the_best():
    s = searcher(epsilon=0.5, steps=1)
    made = items(s)
    s.run(made)
    track = made[0].track
    ranked = sorted(track.found.values(), key=lambda c: -c.score)
    assert track.kept()[:4] == ranked[:4]
    assert set(track.kept()) - set(ranked[:8])


def test_a_cancelled_item_leaves_its_neighbours_alone():
    s = searcher()
    made = items(s)
    want = digests(searcher(), items(searcher()))
    s.add(made)
    for _ in range(5):
        s.step()
    s.cancel(made[1])
    while not s.idle:
        s.step()
    assert made[1].ended == "cancelled"
    assert [digest(made[i].track.trace) for i in (0, 2)] == [want[0], want[2]]


class Nothing(Mutation):
    """A generator with nothing to say."""

    def propose(self, asked, config):
        return Ready([Proposal(problem="it said nothing") for _ in asked])


def test_a_generator_without_ideas_ends_the_search_with_what_there_is():
    s = searcher(generator=Nothing(BANK))
    made = items(s)
    s.run(made)
    assert {i.ended for i in made} == {"barren"}
    assert all(i.track.best is not None and i.problem == "it said nothing" for i in made)


class Down(Mutation):
    """A generator that cannot be reached in its third round."""

    calls = 0

    def propose(self, asked, config):
        Down.calls += 1
        if Down.calls == 3:
            return Ready([Proposal(problem="the endpoint is down", down=True) for _ in asked])
        return super().propose(asked, config)


def test_a_generator_that_is_down_fails_items_that_can_be_resumed():
    Down.calls = 0
    s = searcher(generator=Down(BANK), steps=5)
    made = items(s)
    s.run(made)
    assert all(i.ended == "failed" and "down" in str(i.error) for i in made)
    again = searcher(steps=5)
    rest = [Item(inputs=i.inputs, config=again.config, key=i.key, records=i.track.trace) for i in made]
    assert digests(again, rest) == digests(searcher(steps=5), items(searcher(steps=5)))


def test_inputs_of_another_kind_fail_their_own_item():
    s = searcher(steps=1)
    made = [*items(s), Item(inputs={"sound": 1}, config=s.config)]
    s.run(made)
    assert [i.ended for i in made] == ["steps"] * 3 + ["failed"]
    assert "it was given sound" in str(made[3].error)


@pytest.mark.parametrize(
    "how", [{"ask": 10_000}, {"seconds": -1.0}, {"calls": -5}, {"steps": 1000}, {"epsilon": 2.0}, {"keep": 0}]
)
def test_configurations_that_cannot_run_are_refused(how):
    with pytest.raises(ConfigError, match="must be between"):
        SearchConfig(**how)


@pytest.mark.parametrize(
    "budget", [Budget(steps=-1), Budget(steps=13), Budget(seconds=-2.0), Budget(calls=0), Budget(ask=10_000)]
)
def test_budgets_beyond_the_configuration_are_refused(budget):
    with pytest.raises(Invalid, match=r"budget\."):
        budget.within(SearchConfig(steps=12, ask=12))


@pytest.mark.parametrize(
    ("lines", "says"),
    [([], "no line"), (["", "   "], "no line"), (["a cat", "word " * 1000], "Line 2 of the bank has 1000 words")],
)
def test_banks_with_nothing_or_with_endless_lines_are_refused(lines, says):
    with pytest.raises(Invalid, match=says):
        bank(lines)


def test_empty_lines_and_repeats_of_a_bank_are_left_out():
    assert bank(["a cat", "", "  a   cat ", "a dog"]).lines == ("a cat", "a dog")
