"""Directions: rows of one batch go to different classes by different amounts, by the formula and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from patches import artifact
from patches.engine.patch import ONLY, apply
from patches.families import diffusion
from patches.families.diffusion import Denoiser, Denoising
from patches.mechanisms.direction import DirectionAsk, DirectionConfig, DirectionEdit, move
from registry.errors import Invalid, PatchError

NAMES, DOMAINS = ("cat", "dog", "sun", "ink", "sea"), ("pets", "pets", "things", "things", "things")


@pytest.fixture(scope="module")
def tiny():
    return diffusion.tiny(0)


def edit(norm="unit", **more):
    means = 0.8 * F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    return DirectionEdit(DirectionConfig("given.image", NAMES, DOMAINS, norm=norm, **more), {"means": means})


@torch.inference_mode()
def conditions(base, patch, e, params=None, strengths=None, names=None):
    """(n, k) what the denoiser is told."""
    seen = []
    n = len(e)
    told = {"text": base.model.null()["text"].expand(n, -1, -1), "image": e}
    with apply(base.model, {ONLY: patch}, root=base.root) as on:
        hook = base.model.given["image"].register_forward_hook(lambda _, __, out: seen.append(out))
        with on.rows(names or [ONLY] * n, strengths, params):
            base.model(sample=torch.zeros(n, *base.model.shape), timestep=torch.full((n,), 500.0), **told)
    hook.remove()
    return seen[-1]


def unit(n, seed=1):
    return F.normalize(torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("norm", ["unit", "free"])
def test_every_row_is_moved_by_its_own_formula(tiny, norm):
    patch, e = edit(norm), 3.0 * unit(4)
    means = patch.tensors["means"]
    asks = [("dog", "cat", 1.0), ("sea", "sun", 0.5), ("sun", "ink", -2.0), ("cat", "dog", 0.0)]
    params = [patch.params(DirectionAsk(target=t, source=s, amount=a), tiny) for t, s, a in asks]
    got = conditions(tiny, patch, e, params)
    for row, before, (t, s, a) in zip(got, e, asks, strict=True):
        new = before / 3.0 + a * (means[NAMES.index(t)] - means[NAMES.index(s)])
        torch.testing.assert_close(row, 3.0 * (F.normalize(new, dim=0) if norm == "unit" else new))


def test_a_source_that_is_not_named_is_the_nearest_of_the_domain(tiny):
    patch = edit()
    means = patch.tensors["means"]
    e = F.normalize(means[[2, 3, 0]], dim=1)
    params = [patch.params(DirectionAsk(target=t), tiny) for t in ("sea", "sea", "dog")]
    got = conditions(tiny, patch, e, params)
    want = move(e, means[[4, 4, 1]] - means[[2, 3, 0]], "unit")
    torch.testing.assert_close(got, want)


def test_a_row_that_says_nothing_goes_to_the_next_class_also_beside_rows_that_do(tiny):
    patch = edit(amount=0.7)
    means = patch.tensors["means"]
    e = F.normalize(means[[0, 4]], dim=1)
    want = move(e, 0.7 * (means[[1, 2]] - means[[0, 4]]), "unit")
    torch.testing.assert_close(conditions(tiny, patch, e), want)
    mixed = conditions(tiny, patch, e, [{}, patch.params(DirectionAsk(target="ink", source="sea"), tiny)])
    torch.testing.assert_close(mixed[0], want[0])
    torch.testing.assert_close(mixed[1], move(e[1:], (means[3] - means[4])[None], "unit")[0])


def test_a_row_may_bring_its_own_direction(tiny):
    e, d = unit(2), unit(2, 5)
    got = conditions(tiny, edit(), e, [{"direction": d[0]}, {"direction": 0.1 * d[1]}])
    torch.testing.assert_close(got, move(e, torch.stack([d[0], 0.1 * d[1]]), "unit"))


def test_strength_zero_the_base_and_no_condition_are_left_alone_bit_for_bit(tiny):
    e = unit(3)
    e[2] = 0.0
    got = conditions(tiny, edit(), e, strengths=[1.0, 0.0, 1.0], names=[None, ONLY, ONLY])
    assert torch.equal(got, e)


def test_an_arm_draws_what_the_moved_condition_draws(tiny):
    """Both ways to the same picture: the edit as an arm, and the condition moved by hand."""
    patch, e = edit(), unit(1)[0]
    params = patch.params(DirectionAsk(target="dog", source="cat", amount=1.5), tiny)
    told = {**tiny.model.null(), "image": e}
    d = 1.5 * (patch.tensors["means"][1] - patch.tensors["means"][0])
    by_hand = {**told, "image": move(e[None], d[None], "unit")[0]}
    on = apply(tiny.model, {"arm": patch}, root=tiny.root)
    rows = [
        Denoising(condition=told, other=told, guidance=2.0, steps=4, arm="arm", params=params),
        Denoising(condition=by_hand, other=told, guidance=2.0, steps=4),
    ]
    Denoiser(type("S", (), {"base": tiny, "applied": on})()).run(rows)
    on.revert()
    torch.testing.assert_close(rows[0].out, rows[1].out, atol=1e-5, rtol=1e-4)


def test_what_it_does_not_know_is_refused_in_words(tiny):
    patch = edit()
    for ask, words in (
        (DirectionAsk(target="whale"), "Classes: cat"),
        (DirectionAsk(target="dog", source="sun"), "within one domain"),
    ):
        with pytest.raises(Invalid, match=words):
            patch.params(ask, tiny)
    with pytest.raises(ValueError, match="amount"):
        DirectionAsk(target="dog", amount=1e9)
    with pytest.raises(PatchError, match="class means"):
        DirectionEdit(DirectionConfig("given.image", ("a",), ("d",)), {"means": torch.zeros(1, 4)})
    with pytest.raises(PatchError, match="hooks"):
        patch.fold(tiny.model)


def test_it_is_sealed_and_comes_back(tiny, tmp_path):
    patch = edit(amount=1.25, norm="free")
    about = artifact.save(patch, "diffusion_cf", tmp_path / "a", base=tiny.label)
    _, again = artifact.load(tmp_path / "a", digest=about.digest, base=tiny.digest)
    assert again.config == patch.config
    assert torch.equal(again.tensors["means"], patch.tensors["means"])
