"""Edits of neurons: what they mean, and on CLIP what conformance proves for other mechanisms on a language model."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

from patches import artifact
from patches.engine.patch import apply
from patches.engine.read import record
from patches.families import clip
from patches.families.clip.second_order import directions, lens, look, replaced, scalars
from patches.mechanisms.neurons import NeuronConfig, NeuronEdit, ablate, replace_effects
from registry.errors import PatchError

LAYER, N = 1, 128
SITE = clip.site("neurons", LAYER)
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOME = tuple(range(0, N, 3))
TOGETHER = [[None, "a", None, "a"], ["a", "a", None, "b"], ["b", "a", "a", None], [None] * 4]


@pytest.fixture(scope="module")
def known(tiny_clip):
    at = lens(tiny_clip, LAYER)
    x = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    return at, directions(at, (scalars(look(tiny_clip, part, [LAYER]), LAYER) for part in x.split(20)), keep=8)


OPS = [("mean", 0.0), ("gain", 3.0), ("rank1", 0.0)]


@torch.inference_mode()
def raw(base, x=X):
    """y before it is normalised."""
    with record(base.model, ["visual"]) as out:
        base.model(image=x)
    return out["visual"][0]


@torch.inference_mode()
def unit(base, x=X):
    return base.model(image=x)["image_features"]


@pytest.mark.parametrize(("op", "gain"), OPS)
def test_effects_are_replaced_as_the_lens_says(tiny_clip, known, op, gain):
    at, dirs = known
    s = scalars(look(tiny_clip, X, [LAYER]), LAYER)
    mask = torch.zeros(N, dtype=torch.bool)
    mask[list(SOME)] = True
    want = raw(tiny_clip) + (1 - gain) * replaced(at, dirs, s, "rank1" if op == "rank1" else "mean", mask)
    with replace_effects(tiny_clip, at, dirs, SOME, op, gain).apply(tiny_clip.model) as on:
        torch.testing.assert_close(raw(tiny_clip), want, atol=2e-5, rtol=1e-4)
        assert on.unreached() == []


@pytest.mark.parametrize(("op", "gain"), OPS)
def test_on_clip_every_edit_is_reversible_and_a_matter_of_rows(tiny_clip, known, op, gain):
    """What tests/patches/test_conformance.py proves for sites that a language model has."""
    arms = {"a": replace_effects(tiny_clip, *known, SOME, op, gain), "b": replace_effects(tiny_clip, *known, [5, 4])}
    before = unit(tiny_clip)
    after = {None: before}
    for name, patch in arms.items():
        with patch.apply(tiny_clip.model, strength=0.0):
            assert torch.equal(unit(tiny_clip), before)
        with patch.apply(tiny_clip.model):
            after[name] = unit(tiny_clip)
            assert not torch.equal(after[name], before)
        assert torch.equal(unit(tiny_clip), before)
    with apply(tiny_clip.model, arms) as on:
        for rows in TOGETHER:
            with on.rows(rows):
                mixed = unit(tiny_clip)
            for i, name in enumerate(rows):
                if name is None:
                    assert torch.equal(mixed[i], before[i])
                torch.testing.assert_close(mixed[i], after[name][i], atol=1e-5, rtol=1e-5)

        def call(seed):
            rows = TOGETHER[seed % len(TOGETHER)]
            with on.rows(rows):
                got = unit(tiny_clip)
            return all(torch.allclose(got[i], after[n][i], atol=1e-5, rtol=1e-5) for i, n in enumerate(rows))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(call, range(24)))
        with on.rows(["a"]):  # one name for a batch of any size
            torch.testing.assert_close(unit(tiny_clip), after["a"], atol=1e-5, rtol=1e-5)
        with on.rows([None, "a"]):  # each name for k neighbours
            mixed = unit(tiny_clip)
        assert torch.equal(mixed[:2], before[:2])
        torch.testing.assert_close(mixed[2:], after["a"][2:], atol=1e-5, rtol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_clip.model.modules())


def test_strength_scales_what_is_taken_away(tiny_clip, known):
    patch, before = replace_effects(tiny_clip, *known, SOME), raw(tiny_clip)
    with patch.apply(tiny_clip.model):
        whole = raw(tiny_clip) - before
    with patch.apply(tiny_clip.model, strength=0.25):
        torch.testing.assert_close(raw(tiny_clip) - before, 0.25 * whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", ["all", "cls", "patches"])
def test_activations_become_what_they_should_at_the_tokens_meant(tiny_clip, tokens):
    with record(tiny_clip.model, [SITE], "input") as acts:
        unit(tiny_clip)
    a, m, g = acts[SITE][0], torch.full((3,), 0.7), torch.tensor([0.0, 2.0, -1.0])
    patch = ablate(SITE, (4, 9, 2), m, g, tokens)
    assert patch.config.op == "gain"
    want = a.clone()
    at = {"all": slice(None), "cls": slice(0, 1), "patches": slice(1, None)}[tokens]
    want[:, at, [4, 9, 2]] = 0.7 + g * (a[:, at, [4, 9, 2]] - 0.7)
    with patch.apply(tiny_clip.model), record(tiny_clip.model, [SITE], "input") as acts:
        unit(tiny_clip)
    torch.testing.assert_close(acts[SITE][0], want)


@pytest.mark.parametrize("gain", [0.0, 2.5])
def test_an_edit_of_all_tokens_folds_with_its_mean_in_the_bias(tiny_clip, gain):
    patch = ablate(SITE, SOME, torch.linspace(-1, 1, len(SOME)), gain)
    with patch.apply(tiny_clip.model):
        want = unit(tiny_clip)
    with torch.inference_mode():
        got = patch.fold(tiny_clip.model)(image=X)["image_features"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_what_depends_on_attention_or_tokens_does_not_fold(tiny_clip, known):
    for patch in (replace_effects(tiny_clip, *known, SOME), ablate(SITE, SOME, torch.zeros(len(SOME)), tokens="cls")):
        with pytest.raises(PatchError, match="hooks"):
            patch.fold(tiny_clip.model)


@pytest.mark.parametrize(("op", "gain"), OPS)
def test_second_order_edits_are_saved_and_loaded(tiny_clip, known, tmp_path, op, gain):
    patch = replace_effects(tiny_clip, *known, SOME, op, gain)
    about = artifact.save(patch, "second_order", tmp_path, base=tiny_clip.label)
    _, loaded = artifact.load(tmp_path, digest=about.digest, base=tiny_clip.digest)
    with patch.apply(tiny_clip.model):
        want = unit(tiny_clip)
    with loaded.apply(tiny_clip.model):
        assert torch.equal(unit(tiny_clip), want)


@pytest.mark.parametrize(
    ("change", "tensors", "says"),
    [
        ({"neurons": ()}, {}, "no neuron"), ({"neurons": (1, 1)}, {}, "different"),
        ({"neurons": (-1, 2)}, {}, "different"),
        ({}, {"mean": torch.zeros(3)}, "'mean' of 2 rows"), ({"op": "gain"}, {"mean": torch.zeros(2)}, "'gain'"),
        ({"op": "rank1"}, {"mean": torch.zeros(2)}, "second_order"),
        ({}, {"mean": torch.tensor([0.0, float("nan")])}, "finite"),
        ({"path": "second_order", "layers": 3}, {"mean": torch.zeros(2, 4)}, "'write'"),
        ({"path": "second_order", "layers": 3}, {"mean": torch.zeros(2, 4), "write": torch.zeros(2, 5, 24)}, "fit"),
        ({"path": "second_order", "layers": 2}, {"mean": torch.zeros(2, 4), "write": torch.zeros(2, 4, 9)}, "2 blocks"),
        ({"path": "second_order", "tokens": "cls"}, {"mean": torch.zeros(2, 4)}, "tokens"),
    ],
)  # fmt: skip
def test_edits_that_make_no_sense_are_refused(change, tensors, says):
    with pytest.raises(PatchError, match=says):
        NeuronEdit(NeuronConfig(**{**asdict(NeuronConfig(SITE, (1, 2))), **change}), tensors)


def test_a_neuron_that_is_not_there_is_named(tiny_clip, known):
    with pytest.raises(PatchError, match="0 to 127"):
        replace_effects(tiny_clip, *known, [128])
