import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from patches.engine.read import record
from patches.families import llm
from patches.mechanisms.features import (
    ROWS,
    SAE,
    FeatureConfig,
    FeatureEdit,
    edit,
    kth_largest,
    normalised,
    thresholded,
)
from patches.sae_files import convert_sae, hook_layer, load_sae, save_sae
from registry.errors import BadArtifact, NotFound, PatchError

D, F, S = 32, 96, (3, 17, 40, 41, 95)
SITE = llm.site("block", 1)
KINDS = [("relu", "none"), ("topk", "none"), ("jumprelu", "none"), ("relu", "layer_norm"), ("topk", "layer_norm"),
         ("jumprelu", "norm")]  # fmt: skip


def random_sae(activation="relu", normalise="none", seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(F, D, generator=g, dtype=dtype), dim=1)
    return SAE(
        encoder=decoder + 0.1 * torch.randn(F, D, generator=g, dtype=dtype),
        bias=0.2 * torch.randn(F, generator=g, dtype=dtype),
        decoder=decoder,
        decoder_bias=torch.randn(D, generator=g, dtype=dtype),
        activation=activation,
        k=12 if activation == "topk" else 0,
        threshold=0.3 * torch.rand(F, generator=g, dtype=dtype) if activation == "jumprelu" else None,
        normalise=normalise,
        site=SITE,
    )


def activations(*shape, seed=5, dtype=torch.float32):
    return 2.0 * torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


def rewrite(patch, x):
    return patch.edits()[0].fn(x, None)


@pytest.fixture(params=KINDS, ids="-".join)
def sae(request):
    return random_sae(*request.param)


def changed(f, op, value):
    return {
        "zero": f * 0,
        "clamp": f * 0 + value,
        "cap": f.minimum(f * 0 + value),
        "scale": f * value,
        "add": f + value,
    }[op]


@pytest.mark.parametrize("op", ["zero", "clamp", "cap", "scale", "add"])
def test_the_closed_form_is_the_long_form(sae, op):
    """x' = Dec(f') + (x - Dec(f)), with the whole dictionary run twice."""
    x, value = activations(3, 7), torch.tensor([0.5, 1.5, -1.0, 2.0, 0.1])
    f = sae.encode(x)
    new = f.clone()
    new[..., S] = changed(f[..., S], op, value)
    want = sae.decode(new, x) + (x - sae.decode(f, x))
    got = rewrite(edit(sae, SITE, S, op, value), x)
    assert (got - x).abs().max() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["zero", "clamp", "cap", "scale"])
def test_one_threshold_for_all_is_what_many_equal_ones_are(op):
    """`thresholded` gives every feature the same one, which is applied in place."""
    many = random_sae("jumprelu")
    same = replace(many, threshold=torch.full_like(many.bias, 0.7))
    nearly = replace(same, threshold=same.threshold.clone())
    nearly.threshold[S[0]] += 1e-7  # one bit: no longer one number
    assert not torch.equal(same.threshold, nearly.threshold)
    x, value = activations(3, 7), torch.tensor([0.5, 1.5, -1.0, 2.0, 0.1])
    one, two = (rewrite(edit(sae, SITE, S, op, value), x) for sae in (same, nearly))
    assert (one - x).abs().max() > 0.1
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_no_edit_keeps_the_error_and_is_the_identity(sae):
    x = activations(4, 9)
    got = rewrite(edit(sae, SITE, range(F), "scale", 1.0), x)
    assert (got - x).norm() <= 1e-6 * x.norm()
    assert (sae.decode(sae.encode(x), x) - x).norm() > 0.1 * x.norm()  # the dictionary alone is far from it


def test_clamping_to_its_own_value_is_the_identity(sae):
    x = activations(1, 1)
    got = rewrite(edit(sae, SITE, S, "clamp", sae.encode(x)[0, 0, list(S)]), x)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_clamping_a_dead_feature_to_zero_changes_no_bit(sae):
    sae.bias[17] = -1e6
    x = activations(4, 9)
    assert (sae.encode(x)[..., 17] == 0).all()
    for op, value in (("zero", 0.0), ("clamp", 0.0), ("scale", 0.0)):
        got = rewrite(edit(sae, SITE, [17], op, value), x)
        assert torch.equal(got, x) or (sae.normalise != "none" and torch.allclose(got, x, atol=0, rtol=0))


def test_topk_fires_at_most_k():
    sae = random_sae("topk")
    fired = (sae.encode(activations(50, 20)) > 0).sum(-1)
    assert fired.max() <= 12
    assert fired.float().mean() > 10


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("rows", "columns", "k"), [(5, 4096, 32), (3, 2048, 1), (4, 100, 7), (2, 64, 8), (1, 16, 16)])
def test_the_kth_largest_is_exact_ties_and_all(rows, columns, k, threads):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rough in (x, x.mul(4).round() / 4, torch.zeros_like(x), x.bfloat16()):
            assert torch.equal(kth_largest(rough.clone(), k), rough.topk(k).values[:, -1:])
    finally:
        torch.set_num_threads(before)


def test_the_kth_largest_can_be_traced():
    class Least(torch.nn.Module):
        def forward(self, x):
            return kth_largest(x, 3)

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    traced = torch.export.export(Least(), (x,)).module()
    assert torch.equal(traced(-x), kth_largest(-x, 3))


def test_top_k_of_many_tokens_is_that_of_each(sae):
    wide = random_sae("topk")
    x = activations(7, 90)
    patch = edit(wide, SITE, [0, 3, 5])
    assert 2 * ROWS < 7 * 90
    torch.testing.assert_close(rewrite(patch, x), torch.cat([rewrite(patch, part) for part in x.split(1)]))


def test_an_edit_carries_only_the_rows_it_needs():
    for activation, rows in (("relu", len(S)), ("jumprelu", len(S)), ("topk", F)):
        tensors = edit(random_sae(activation), SITE, S, "clamp", 1.0).tensors
        assert tensors["encoder"].shape == (rows, D)
        assert tensors["decoder"].shape == (len(S), D)
    assert set(edit(random_sae(), SITE, S, "add", 1.0).tensors) == {"decoder", "value"}


@pytest.mark.parametrize("tokens", ["all", "cls", "patches", "mask"])
def test_only_the_chosen_tokens_change(sae, tokens):
    x = activations(2, 9)
    mask = torch.tensor([0, 0, 1, 0, 0.5, 0, 0, 0, 1])
    patch = edit(sae, SITE, S, "clamp", 3.0, tokens, mask if tokens == "mask" else None)
    got = rewrite(patch, x)
    everywhere = rewrite(edit(sae, SITE, S, "clamp", 3.0), x)
    share = {"all": torch.ones(9), "cls": torch.eye(9)[0], "patches": 1 - torch.eye(9)[0], "mask": mask}[tokens]
    torch.testing.assert_close(got, x + share[:, None] * (everywhere - x), atol=1e-5, rtol=1e-5)
    assert torch.equal(got[:, share == 0], x[:, share == 0])


def test_a_mask_for_another_number_of_tokens_is_refused(sae):
    patch = edit(sae, SITE, S, "zero", tokens="mask", mask=torch.ones(5))
    with pytest.raises(PatchError, match="5 tokens, but .* has 9"):
        rewrite(patch, activations(1, 9))


def test_half_precision_activations_are_edited_in_the_dictionarys_precision(sae):
    x = activations(2, 5)
    got = rewrite(edit(sae, SITE, S, "clamp", 1.0), x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), rewrite(edit(sae, SITE, S, "clamp", 1.0), x), atol=0.1, rtol=0.05)


def test_what_is_added_at_a_site_is_what_leaves_it(tiny_llm):
    """Through the engine: steering by `add` moves every token of the site by value * W_j, and nothing else there."""
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(2))
    sae = random_sae()
    with torch.inference_mode(), record(tiny_llm.model, [SITE]) as before:
        tiny_llm.model(input_ids=ids)
    with (
        torch.inference_mode(),
        edit(sae, SITE, [7], "add", 4.0).apply(tiny_llm.model),
        record(tiny_llm.model, [SITE]) as after,
    ):
        tiny_llm.model(input_ids=ids)
    moved = after[SITE][0] - before[SITE][0]
    torch.testing.assert_close(moved, (4.0 * sae.decoder[7]).expand_as(moved), atol=1e-5, rtol=1e-5)


def test_thresholds_fire_as_often_as_topk_did():
    sae = random_sae("topk")
    calibration, fresh = activations(4000, seed=1), activations(4000, seed=2)
    converted = thresholded(sae, calibration.split(1000))
    assert converted.activation == "jumprelu"
    l0 = (converted.encode(calibration) > 0).sum(-1).float().mean()
    assert abs(l0 - 12) < 0.01
    assert abs((converted.encode(fresh) > 0).sum(-1).float().mean() - 12) < 0.3
    on = (sae.encode(fresh) > 0) & (converted.encode(fresh) > 0)
    assert torch.equal(sae.encode(fresh)[on], converted.encode(fresh)[on])


def test_what_normalisation_takes_away_is_given_back():
    x = activations(6, 4)
    for how in ("none", "layer_norm", "norm"):
        n, scale, shift = normalised(x, how)
        torch.testing.assert_close(n * scale + shift, x, atol=2e-4, rtol=1e-4)
    n, _, _ = normalised(x, "layer_norm")
    torch.testing.assert_close(n.std(-1), torch.ones(6, 4), atol=1e-4, rtol=0)


# ---- files -------------------------------------------------------------------------------------------------------


def test_save_and_load_is_the_same_dictionary(sae, tmp_path):
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    for name, value in vars(sae).items():
        got = getattr(again, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


def published(seed=3):
    g = torch.Generator().manual_seed(seed)
    weights = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    return {k: torch.randn(*shape, generator=g) for k, shape in weights.items()}


def test_a_saelens_topk_dictionary_encodes_by_its_own_conventions(tmp_path):
    """Decoder bias taken off the input, pre-activations times the decoder's norms, activations divided by them."""
    t = published()
    save_file(t, tmp_path / "sae_weights.safetensors")
    about = {"architecture": "topk", "k": 9, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True,
             "normalize_activations": "none", "metadata": {"hook_name": "blocks.7.hook_resid_post"}}  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    sae, x = load_sae(tmp_path), activations(40)
    norm = t["W_dec"].norm(dim=1)
    top = (((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm).topk(9, -1)
    acts = torch.zeros(40, F).scatter_(-1, top.indices, top.values.relu())
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sae.decode(acts, x), (acts / norm) @ t["W_dec"] + t["b_dec"], atol=1e-3, rtol=1e-4)
    assert hook_layer(sae.site) == (7, "resid_post")
    assert hook_layer("visual.transformer.resblocks.7") is None


def test_an_old_saelens_jumprelu_dictionary_has_its_thresholds(tmp_path):
    t = published() | {"log_threshold": torch.full((F,), -0.5)}
    save_file(t, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "jumprelu", "apply_b_dec_to_input": False}))
    x = activations(40)
    pre = x @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(
        load_sae(tmp_path).encode(x), pre * (pre > torch.tensor(-0.5).exp()), atol=1e-3, rtol=1e-4
    )


def test_a_prisma_checkpoint_is_converted_without_pickle(tmp_path):
    """Its forward: layer norm with the unbiased deviation, b_dec off, ReLU; undone after decoding."""
    t = published()
    source = tmp_path / "prisma"
    source.mkdir()
    torch.save(t, source / "weights.pt")
    about = {
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "is_transcoder": False,
        "normalize_activations": "layer_norm",
        "hook_point": "blocks.9.hook_mlp_out",
        "d_in": D,
    }
    (source / "config.json").write_text(json.dumps(about))
    with pytest.raises(NotFound, match="Convert it once"):
        load_sae(source)
    convert_sae(source / "weights.pt", tmp_path / "ours")
    sae, x = load_sae(tmp_path / "ours"), activations(40)
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    acts = (((x - mean) / (std + 1e-5) - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(x), acts, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sae.decode(acts, x), (acts @ t["W_dec"] + t["b_dec"]) * std + mean, atol=1e-3, rtol=1e-4)
    assert hook_layer(sae.site) == (9, "mlp_out")


class Attack:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_checkpoint_that_holds_code_is_not_loaded(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for n, evil in enumerate(({"W_enc": Attack()}, {"cfg": Attack(), "state_dict": published()})):
        file = tmp_path / f"{n}.pt"
        torch.save(evil, file)
        with pytest.raises(BadArtifact, match="not a file of tensors alone"):
            convert_sae(file, tmp_path / "out")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(BadArtifact, match="not a file of tensors alone"):
        convert_sae(tmp_path / "plain.pt", tmp_path / "out")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("about", "why"),
    [
        ({"architecture": "gated"}, "is 'gated'"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, "fold its factor"),
        ({"is_transcoder": True}, "covered are"),
        ({"architecture": "topk"}, "0 < k"),
        ({"architecture": "topk", "k": 10_000}, "0 < k"),
        ({"architecture": "jumprelu"}, "threshold nothing"),
    ],
)
def test_a_dictionary_we_cannot_run_exactly_is_refused(tmp_path, about, why):
    save_file(published(), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(about))
    with pytest.raises(BadArtifact, match=why):
        load_sae(tmp_path)


def test_missing_files_and_shapes_are_named(tmp_path):
    with pytest.raises(NotFound, match="cfg.json"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    save_file({k: v for k, v in published().items() if k != "b_enc"}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(BadArtifact, match="not a JSON object"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(BadArtifact, match="no b_enc"):
        load_sae(tmp_path)
    save_file(published() | {"W_dec": torch.zeros(F, D - 1)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(BadArtifact, match="transposed"):
        load_sae(tmp_path)


def test_an_edit_that_cannot_be_done_is_refused(sae):
    with pytest.raises(PatchError, match="no feature 96"):
        edit(sae, SITE, [0, 96])
    with pytest.raises(PatchError, match="names no feature"):
        edit(sae, SITE, [])
    with pytest.raises(PatchError, match="different rows"):
        edit(sae, SITE, [3, 3])
    with pytest.raises(PatchError, match="not finite"):
        edit(sae, SITE, [3], "clamp", float("nan"))
    with pytest.raises(PatchError, match="belong together"):
        edit(sae, SITE, [3], tokens="mask")
    rows = edit(random_sae(), SITE, [3]).tensors
    with pytest.raises(PatchError, match="needs a tensor 'value'"):
        FeatureEdit(FeatureConfig(SITE, (3,), "clamp"), rows)
