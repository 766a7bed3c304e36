"""What the paper measures around the circuit."""

from __future__ import annotations

from tests.training.attention_sink.some import TINY
from training.attention_sink.measure import fit_words
from training.attention_sink.phenomena import cluster_attack, convergence, sink_attention
from training.data import text


def test_copies_become_lone_tokens_as_they_grow(base):
    near = convergence(base, fit_words(base, TINY)[:2], (1, 16, 128))
    assert near[1] < near[16] < near[128]
    assert near[128] > 0.99


def test_random_clusters_make_fewer_sinks_than_near_ones(base, circuit):
    shares = cluster_attack(base, circuit, sizes=(2,), length=200)
    near, random = shares[2]
    assert near >= random


def test_attention_shares_are_shares_and_the_model_attends_as_before(base):
    before = base.model.config._attn_implementation
    shares = sink_attention(base, text.documents("prose", base.processor, 2, 40))
    assert len(shares) == base.model.config.num_hidden_layers
    assert all(0.0 <= s <= 1.0 for s in shares)
    assert base.model.config._attn_implementation == before
