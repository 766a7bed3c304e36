import math

import pytest
import torch

from patches.engine.edits import Inputs
from patches.engine.patch import apply
from patches.engine.read import record
from patches.families import llm
from patches.mechanisms.sink import SinkConfig, SinkEdit, repeat_bias
from registry.errors import PatchError


def by_hand(ids, limit):
    B, K = ids.shape
    out = torch.zeros(B, 1, K, K)
    for b in range(B):
        for i in range(K):
            for j in range(i + 1):
                if ids[b, j] >= 0:
                    count = sum(int(ids[b, k] == ids[b, j]) for k in range(i + 1))
                    out[b, 0, i, j] = -math.log(max(1.0, count / limit))
    return out


def test_repeat_bias_is_its_definition():
    ids = torch.randint(0, 5, (3, 20), generator=torch.Generator().manual_seed(0))
    ids[1, :6] = -1  # left padding
    at = torch.arange(20).expand(3, -1)
    got = repeat_bias(ids, at, 2.0)
    causal = torch.ones(20, 20).tril().bool()
    torch.testing.assert_close(got.masked_fill(~causal, 0), by_hand(ids, 2.0).masked_fill(~causal, 0))


def test_decoding_one_token_asks_for_the_last_row_of_the_bias():
    ids = torch.randint(0, 4, (2, 15), generator=torch.Generator().manual_seed(3))
    full = repeat_bias(ids, torch.arange(15).expand(2, -1), 2.0)
    last = repeat_bias(ids, torch.tensor([[14], [14]]), 2.0)
    torch.testing.assert_close(last, full[:, :, -1:])


def test_a_run_is_counted_by_itself_and_padding_belongs_to_none():
    ids = torch.tensor([[-1, -1, 5, 5, 6, 5, 5, 5], [7, 7, 7, 8, 8, 9, 9, 9]])
    inputs = Inputs({"input_ids": ids.clamp_min(0), "attention_mask": (ids >= 0).long(), "past_length": 0})
    runs = llm.runs(inputs)
    assert runs[0, :2].tolist() == [-1, -1]
    groups = [[(runs[b] == r).nonzero()[:, 0].tolist() for r in runs[b, runs[b] >= 0].unique()] for b in (0, 1)]
    assert groups == [[[2, 3], [4], [5, 6, 7]], [[0, 1, 2], [3, 4], [5, 6, 7]]]


def test_damping_runs_leaves_text_without_runs_exactly_as_it_was(tiny_llm):
    ids = torch.tensor([[5, 6] * 20])
    with torch.inference_mode():
        before = tiny_llm.model(input_ids=ids).logits
        by_run = SinkConfig(run_layers=(0, 1, 2), run_limit=2.0)
        with SinkEdit(by_run, {}).apply(tiny_llm.model) as on:
            assert torch.equal(tiny_llm.model(input_ids=ids).logits, before)
            assert not on.unreached()
        with SinkEdit(SinkConfig(damp_layers=(0, 1, 2), damp_limit=2.0), {}).apply(tiny_llm.model):
            assert not torch.equal(tiny_llm.model(input_ids=ids).logits, before)


def test_no_repeats_no_bias():
    assert repeat_bias(torch.arange(10)[None], torch.arange(10)[None], 1.0) is None


def test_damping_with_a_limit_beyond_the_text_is_exactly_the_base(tiny_llm):
    ids = torch.full((2, 30), 9)
    with torch.inference_mode():
        before = tiny_llm.model(input_ids=ids).logits
        with SinkEdit(SinkConfig(damp_layers=(0, 1), damp_limit=30.0), {}).apply(tiny_llm.model):
            assert torch.equal(tiny_llm.model(input_ids=ids).logits, before)


def test_copies_together_weigh_no_more_than_the_limit():
    """The claim of the damping, on the attention itself: mass of n copies <= that of `limit` equal keys."""
    model = llm.tiny().model  # its own: transformers leaves hooks behind once it has reported attentions
    model.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, *[9] * 200]])
    patch = SinkEdit(SinkConfig(damp_layers=(0,), damp_limit=4.0), {})
    with torch.inference_mode(), patch.apply(model):
        weights = model(input_ids=ids, output_attentions=True).attentions[0][0, :, -1]  # (heads, K)
    with torch.inference_mode():
        base = model(input_ids=ids, output_attentions=True).attentions[0][0, :, -1]
    copies, prefix = weights[:, 3:].sum(-1), weights[:, :3].sum(-1)
    assert (copies / prefix < base[:, 3:].sum(-1) / base[:, :3].sum(-1) * (4.0 / 200) * 1.01).all()


def test_the_first_token_keeps_its_neurons(tiny_llm):
    site = "model.layers.1.mlp.down_proj"
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(5))
    patch = SinkEdit(SinkConfig(neurons=((1, 4), (1, 9))), {})
    # reading hooks run in the order they were put on: the patch first, then what reads it
    with torch.inference_mode(), patch.apply(tiny_llm.model), record(tiny_llm.model, [site], "input") as acts:
        tiny_llm.model(input_ids=ids)
    a = acts[site][0]
    assert (a[:, 1:, [4, 9]] == 0).all()
    assert (a[:, 0, [4, 9]] != 0).all()


def test_an_empty_patch_is_refused(tiny_llm):
    with pytest.raises(PatchError, match="would do nothing"):
        SinkEdit(SinkConfig(), {}).apply(tiny_llm.model)


def test_a_mode_without_its_values_is_refused():
    with pytest.raises(PatchError, match="one number per neuron"):
        SinkEdit(SinkConfig(neurons=((0, 1),), mode="clip"), {})


def test_a_cache_begun_without_the_patch_is_refused(tiny_llm):
    from transformers import DynamicCache

    cache = DynamicCache(config=tiny_llm.model.config)
    ids = torch.full((1, 6), 9)
    with torch.inference_mode():
        tiny_llm.model(input_ids=ids, past_key_values=cache, use_cache=True)
        with apply(tiny_llm.model, {"a": SinkEdit(SinkConfig(damp_layers=(0,), damp_limit=1.0), {})}) as on:
            with on.rows(["a"]), pytest.raises(PatchError, match="prefill it again"):
                tiny_llm.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
