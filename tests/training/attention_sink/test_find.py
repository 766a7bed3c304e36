"""The circuit is found without hints, and nothing is found where there is none."""

from __future__ import annotations

import pytest
import torch

from patches.families import llm
from patches.mechanisms.sink import SinkConfig
from tests.training.attention_sink.some import TINY
from training.attention_sink.find import find
from training.attention_sink.fit import candidates
from training.attention_sink.measure import fit_words


def test_the_planted_neuron_is_found_without_hints_and_no_other(circuit):
    assert circuit.bound_to == "position"
    assert circuit.stages == (((1, 7),),)
    assert circuit.echoes == ()


@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (1, 40)])
def test_wherever_it_is_planted(layer, neuron):
    base = llm.planted(layer, neuron)
    assert find(base, fit_words(base, TINY)[:4], 100).stages == (((layer, neuron),),)


def test_a_neuron_that_answers_on_repeats_alone_is_an_echo_and_no_part_of_the_sink():
    base = llm.planted()
    lm, bos = base.model, base.processor.bos_token_id
    mlp = lm.model.layers[1].mlp
    with torch.no_grad():
        lm.model.embed_tokens.weight[bos, 4] = 1.0
        mlp.gate_proj.weight[20], mlp.up_proj.weight[20] = 0.0, 0.0
        mlp.gate_proj.weight[20, 0], mlp.gate_proj.weight[20, 3], mlp.gate_proj.weight[20, 4] = 20.0, -10.0, -20.0
        mlp.up_proj.weight[20, 3] = 1.0
        mlp.down_proj.weight[:, 20] = 0.0
        mlp.down_proj.weight[1, 20] = 8.0
    circuit = find(base, fit_words(base, TINY)[:4], 100)
    assert circuit.stages == (((1, 7),),)
    assert circuit.echoes == ((1, 20),)
    tried = candidates(TINY, circuit)
    assert tried["paper"].neurons == ((1, 7),)
    assert tried["paper with echoes, at repeats"] == SinkConfig(neurons=((1, 7), (1, 20)), only_repeats=True)


def test_finding_changes_nothing(base, circuit):
    assert llm.weights_digest(base.model) == llm.planted().digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())
