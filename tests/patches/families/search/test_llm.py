"""The language model as the generator: shared prompt keys give what whole prompts give; rows are their own."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from patches.families.llm.worker import Decoder, Row
from patches.families.search.config import SearchConfig
from patches.families.search.generators import Asked
from patches.families.search.llm import LINE_TOKENS, LanguageModel, copied, head, tail
from patches.families.search.track import Candidate

KEPT = [
    [Candidate("a cat on sand", 0.4, 0, ""), Candidate("a dog", 0.3, 0, "")],
    [Candidate("a cup", 0.5, 0, ""), Candidate("a red hat and a cup", 0.45, 0, ""), Candidate("a hat", 0.1, 0, "")],
]
CONFIG = SearchConfig(generator="llm", ask=3, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    from patches.families import llm

    base = llm.tiny()
    base.model.config.max_position_embeddings = 2048  # its letters make long prompts
    return LanguageModel(base)


def asked(seed=0, want=3):
    return [Asked(kept, want, random.Random(seed + i), {}) for i, kept in enumerate(KEPT)]


def finish(proposing):
    slices = 0
    while not proposing.advance():
        slices += 1
    return proposing, slices


@torch.inference_mode()
def test_shared_keys_give_what_whole_prompts_give(model):
    """Greedy lines behind the cached head equal those a decoder writes after the whole prompt."""
    rows = []
    proposing = model.propose(asked(), CONFIG)
    proposing.advance()
    rows = {line.item: line for line in proposing.running}
    finish(proposing)
    for i, a in enumerate(asked()):
        prompt = model.encode(head(CONFIG), True) + model.encode(tail(a, CONFIG), False)
        whole = Row(prompt, max_tokens=LINE_TOKENS)
        Decoder(model.base, context=2048).run([whole])
        n = min(len(whole.out), len(rows[i].out))
        assert n > 0
        assert rows[i].out[:n] == whole.out[:n]


def written(model, asks, config):
    """item -> the tokens of its rows, sorted; and slices of work."""
    proposing = model.propose(asks, config)
    proposing.advance()
    rows = list(proposing.running)
    _, slices = finish(proposing)
    return [sorted(r.out for r in rows if r.item == i) for i in range(len(asks))], slices


def test_proposals_are_the_seeds_whoever_is_beside(model):
    hot = dataclasses.replace(CONFIG, temperature=1.0)
    together, slices = written(model, asked(), hot)
    assert slices <= LINE_TOKENS + 1
    alone = [written(model, [a], hot)[0][0] for a in asked()]
    assert together == alone
    assert written(model, asked(seed=9), hot)[0] != alone


def test_tokens_are_counted_and_dropped_items_stop(model):
    proposing = model.propose(asked(), dataclasses.replace(CONFIG, temperature=1.0))
    proposing.advance()
    proposing.drop(0)
    proposing.drop(1)
    _, slices = finish(proposing)
    assert slices <= 2
    assert all(r.tokens > 0 for r in proposing.results())


def test_the_published_stream_is_one_row_that_writes_a_list(model):
    proposing = model.propose(asked(want=1), dataclasses.replace(CONFIG, how="official"))
    assert len(proposing.rows) == 2
    finish(proposing)
    assert all(len(r.out) <= LINE_TOKENS for r in proposing.rows)


def test_copied_slots_hold_what_they_were_copied_from(model):
    cache = model.head(head(CONFIG))
    made = copied(cache, [0, 0, 0], cache.lengths[0] + 4, model._cache())
    n = cache.lengths[0]
    assert made.lengths == [n] * 3
    for layer in range(len(made.keys)):
        assert torch.equal(made.keys[layer][2, :, :n], cache.keys[layer][0, :, :n])
    assert torch.equal(made.ids[1, :n], cache.ids[0, :n])
