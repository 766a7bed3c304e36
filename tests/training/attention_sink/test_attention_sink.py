"""Planted truth: a model whose sink neuron is known, one whose sink belongs to BOS, one without any."""

import json

import pytest
import torch

from patches import artifact
from patches.families import llm
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from registry.errors import PatchError
from training import attention_sink as job
from training.data import text

TINY = job.RECIPES["tiny"]


@pytest.fixture(scope="module")
def base():
    return llm.planted()


@pytest.fixture(scope="module")
def circuit(base):
    return job.find(base, job._fit_words(base, TINY)[:4], 100)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    return folder, job.fit(TINY, folder)


def test_the_planted_neuron_is_found_without_hints_and_no_other(circuit):
    assert circuit.bound_to == "position"
    assert circuit.stages == (((1, 7),),)
    assert circuit.echoes == ()


@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (1, 40)])
def test_wherever_it_is_planted(layer, neuron):
    base = llm.planted(layer, neuron)
    assert job.find(base, job._fit_words(base, TINY)[:4], 100).stages == (((layer, neuron),),)


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
    circuit = job.find(base, job._fit_words(base, TINY)[:4], 100)
    assert circuit.stages == (((1, 7),),)
    assert circuit.echoes == ((1, 20),)
    tried = job.candidates(TINY, circuit)
    assert tried["paper"].neurons == ((1, 7),)
    assert tried["paper with echoes, at repeats"] == SinkConfig(neurons=((1, 7), (1, 20)), only_repeats=True)


def test_a_sink_that_belongs_to_bos_is_told_apart_and_not_patched(tmp_path, monkeypatch):
    base = llm.planted(by_bos=True)
    assert job.find(base, job._fit_words(base, TINY)[:4], 100).bound_to == "bos"
    monkeypatch.setattr(job, "load_base", lambda *_: base)
    with pytest.raises(PatchError, match="bound to its BOS token"):
        job.fit(TINY, tmp_path)


def test_a_model_without_a_sink_is_refused(tmp_path, monkeypatch):
    base = llm.tiny(seed=1)
    monkeypatch.setattr(job, "load_base", lambda *_: base)
    with pytest.raises(PatchError, match="no attention sink"):
        job.fit(TINY, tmp_path)


def test_finding_changes_nothing(base, circuit):
    assert llm.weights_digest(base.model) == llm.planted().digest
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.model.modules())


def test_copies_become_lone_tokens_as_they_grow(base):
    near = job.convergence(base, job._fit_words(base, TINY)[:2], (1, 16, 128))
    assert near[1] < near[16] < near[128]
    assert near[128] > 0.99


def test_the_base_fails_at_many_copies_and_the_patch_mends_it(fitted):
    folder, _ = fitted
    model = Subject.load(folder, llm.planted())
    base, patched = (job.evaluate(model, TINY, arm) for arm in (None, "patch"))
    model.close()
    assert base.keys() == patched.keys()
    assert base["quality/repeat_prefix_4"] == patched["quality/repeat_prefix_4"] == 1.0
    assert base["quality/repeat_prefix_128"] < 1.0 == patched["quality/repeat_prefix_128"]
    assert base["quality/continue_100"] < 1.0 == patched["quality/continue_100"]
    for source in text.SOURCES:
        name = f"quality/perplexity_{source}"
        assert patched[name] == pytest.approx(base[name], rel=0.01)


def test_the_controls_do_not_mend_it(base):
    words = job._test_words(base, TINY)
    rng = torch.Generator().manual_seed(0)
    arms = {
        "paper": SinkEdit(SinkConfig(neurons=((1, 7),)), {}),
        "random": SinkEdit(SinkConfig(neurons=((1, int(torch.randint(8, 48, (1,), generator=rng))),)), {}),
    }
    model = Subject(base, arms)
    right = {arm: sum(job.repeats(model, words, "bos", (128,), arm, True).right[128]) for arm in (None, *arms)}
    model.close()
    assert right["random"] == right[None] < right["paper"]


def test_everything_that_was_tried_is_sealed_with_the_patch(fitted):
    folder, about = fitted
    report = json.loads((folder / "report.json").read_text())
    assert report["chosen"] in report["candidates"]
    assert {"base", "paper"} <= report["candidates"].keys()
    assert "report.json" in about.files
    assert artifact.load(folder)[0].digest == about.digest


def test_random_clusters_make_fewer_sinks_than_near_ones(base, circuit):
    shares = job.cluster_attack(base, circuit, sizes=(2,), length=200)
    near, random = shares[2]
    assert near >= random


def test_attention_shares_are_shares_and_the_model_attends_as_before(base):
    before = base.model.config._attn_implementation
    shares = job.sink_attention(base, text.documents("prose", base.processor, 2, 40))
    assert len(shares) == base.model.config.num_hidden_layers
    assert all(0.0 <= s <= 1.0 for s in shares)
    assert base.model.config._attn_implementation == before


def test_words_for_fitting_and_testing_are_disjoint(base):
    assert not set(job._fit_words(base, TINY)) & set(job._test_words(base, TINY))
