"""Identities of the second-order lens, in float64 on a random tower; planted truths are in tests/training."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from patches.engine.read import record
from patches.families import clip
from patches.families.clip.second_order import (
    MOVES,
    EffectMoments,
    by_token,
    directions,
    effects,
    follow,
    lens,
    look,
    official,
    reading,
    replaced,
    scalars,
)
from registry.errors import Invalid

L, H, N = 4, 4, 128


@pytest.fixture(scope="module")
def base():
    made = clip.tiny(layers=L)
    return replace(made, model=deepcopy(made.model).double())


@pytest.fixture(scope="module")
def x():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def inside(base, x, layer):
    """p (B, T, N), the stream after the block, and the pattern, ln_1 and ln_post statistics the slow way."""
    blocks = base.model.visual.transformer.resblocks
    with (
        record(base.model, [clip.site("neurons", layer)], "input") as p,
        record(base.model, [clip.site("block", i) for i in range(L)]) as z,
        record(base.model, [clip.site("pattern", i) for i in range(L)]) as A,
    ):
        base.model(image=x)
    stream = [z[clip.site("block", i)][0] for i in range(L)]
    sigma = [(stream[i - 1].var(-1, unbiased=False) + 1e-5).sqrt() for i in range(1, L)]
    post = (stream[-1][:, 0].var(-1, unbiased=False) + 1e-5).sqrt()
    return p[clip.site("neurons", layer)][0], stream, [a[0] for a in A.values()], [None, *sigma], post, blocks


def value_path(base, written, layer, A, sigma, post, blocks, centre=True):
    """(B, k) of what is written into the stream (B, T, D), followed token by token and head by head."""
    visual = base.model.visual
    middle = (lambda v: v - v.mean(-1, keepdim=True)) if centre else (lambda v: v)
    out = 0
    for i in range(layer + 1, L):
        attn, e = blocks[i].attn, 32 // H
        read = middle(written) / sigma[i][..., None] * blocks[i].ln_1.weight
        for h in range(H):
            value = attn.in_proj_weight[64 + h * e : 64 + (h + 1) * e]
            moved = A[i][:, h, :1] @ (read @ value.T)  # (B, 1, e)
            back = (moved @ attn.out_proj.weight[:, h * e : (h + 1) * e].T)[:, 0]
            out = out + middle(back) / post[:, None] * visual.ln_post.weight @ visual.proj
    return out


@pytest.mark.parametrize("ln", ["own", "official"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_closed_form_is_the_explicit_loop(base, x, layer, ln):
    p, _, A, sigma, post, blocks = inside(base, x, layer)
    at = lens(base, layer, ln)
    got = effects(at, scalars(look(base, x, [layer]), layer))
    w = blocks[layer].mlp.c_proj.weight
    for n in range(0, N, 9):
        want = value_path(base, p[..., n : n + 1] * w[:, n], layer, A, sigma, post, blocks, ln == "own")
        torch.testing.assert_close(got[:, n], want, atol=1e-10, rtol=1e-8)


def test_the_closed_form_is_the_loop_in_float32(tiny_clip, x, base):
    """The same against float64, on the model as it is served: 1e-6 of the largest effect."""
    four = clip.tiny(layers=L)
    got = effects(lens(four, 1), scalars(look(four, x.float(), [1]), 1))
    want = effects(lens(base, 1), scalars(look(base, x, [1]), 1))
    assert float((got - want).abs().max()) < 1e-6 * max(1.0, float(want.abs().max()))


def test_effects_of_all_neurons_are_the_value_path_of_the_mlp(base, x):
    p, _, A, sigma, post, blocks = inside(base, x, 1)
    at, seen = lens(base, 1), look(base, x, [1])
    want = value_path(base, p @ blocks[1].mlp.c_proj.weight.T, 1, A, sigma, post, blocks)
    torch.testing.assert_close(at.total(at.coordinates(scalars(seen, 1))), want, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(seen.y, base.model.visual(x), atol=0, rtol=0)


def test_coordinates_keep_lengths_and_angles(base, x):
    at = lens(base, 1)
    s = scalars(look(base, x, [1]), 1)
    phi, c = effects(at, s), at.coordinates(s)
    torch.testing.assert_close((c @ c.mT).permute(1, 2, 0), torch.einsum("bnk,cnk->bcn", phi, phi))
    texts = torch.randn(7, phi.shape[-1]).double()
    torch.testing.assert_close(torch.einsum("bgn,ngm->bnm", s, at.against(texts)), phi @ texts.T)
    torch.testing.assert_close(at.write([3, 9]), at.write()[[3, 9]])


def test_effects_on_texts_fall_apart_by_token(base, x):
    at, seen = lens(base, 1), look(base, x, [0, 1])
    texts = torch.randn(3, seen.y.shape[1]).double()
    say = reading(base, 1, texts)
    torch.testing.assert_close(say, at.against(texts))
    torch.testing.assert_close(reading(base, 1, texts, "official"), lens(base, 1, "official").against(texts))
    whole = at.total(at.coordinates(scalars(seen, 1))) @ texts.T
    torch.testing.assert_close(by_token(seen, 1, say).sum(2), whole)


def test_many_layers_are_read_in_one_forward(base, x):
    seen = look(base, x, [2, 0])
    for layer in (0, 2):
        torch.testing.assert_close(scalars(seen, layer), scalars(look(base, x, [layer]), layer))
    assert lens(base, 0).head(0) == (1, 0)
    assert lens(base, 0).head(9) == (3, 1)


def test_effects_are_linear_in_what_a_neuron_writes(base, x):
    """Frozen S: scaling w_n scales phi_n alone; a neuron that never fires has none; P scales all."""
    seen, before = look(base, x, [1]), lens(base, 1)
    other = replace(base, model=deepcopy(base.model))
    with torch.no_grad():
        other.model.visual.transformer.resblocks[1].mlp.c_proj.weight[:, 7] *= 3
        other.model.visual.proj *= 2
    s = scalars(seen, 1)
    s[:, :, 11] = 0
    one, two = effects(before, s), effects(lens(other, 1), s)
    torch.testing.assert_close(two[:, 8:], 2 * one[:, 8:])
    torch.testing.assert_close(two[:, 7], 6 * one[:, 7])
    assert not one[:, 11].any()


def test_permuting_hidden_neurons_permutes_effects(base, x):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    other = replace(base, model=deepcopy(base.model))
    mlp = other.model.visual.transformer.resblocks[1].mlp
    with torch.no_grad():
        mlp.c_fc.weight.copy_(mlp.c_fc.weight[order])
        mlp.c_fc.bias.copy_(mlp.c_fc.bias[order])
        mlp.c_proj.weight.copy_(mlp.c_proj.weight[:, order])
    one = effects(lens(base, 1), scalars(look(base, x, [1]), 1))
    two = effects(lens(other, 1), scalars(look(other, x, [1]), 1))
    torch.testing.assert_close(two, one[:, order])


def test_batch_size_changes_nothing(base, x):
    whole = scalars(look(base, x, [1]), 1)
    torch.testing.assert_close(torch.cat([scalars(look(base, row[None], [1]), 1) for row in x]), whole)


def test_the_last_layer_is_refused_and_told_why(base):
    with pytest.raises(Invalid, match="layers 0 to 2"):
        lens(base, 3)
    with pytest.raises(Invalid, match="Layer -1"):
        look(base, torch.zeros(1, 3, 32, 32), [-1])


# ---- the authors' definition -------------------------------------------------------------------------------------


def test_the_official_effects_differ_by_one_vector_for_all_neurons(base, x):
    at, seen = lens(base, 1, "official"), look(base, x, [1], keep=True)
    closed = 100 * effects(at, scalars(seen, 1)) / seen.y.norm(dim=1)[:, None, None]
    off = official(base, at, seen) - closed
    torch.testing.assert_close(off, off[:, :1].expand_as(off), atol=1e-10, rtol=0)
    assert float(off.abs().max()) > 0
    with pytest.raises(Invalid, match="official"):
        official(base, lens(base, 1), seen)


# ---- following a change ------------------------------------------------------------------------------------------


def test_a_frozen_single_hop_patch_of_one_neuron_is_its_effect(base, x):
    p, stream, *_, blocks = inside(base, x, 1)
    phi = effects(lens(base, 1), scalars(look(base, x, [1]), 1))
    for n in (3, 40, 77):
        delta = p[..., n : n + 1] * blocks[1].mlp.c_proj.weight[:, n]
        torch.testing.assert_close(follow(base, 1, stream[1], delta), phi[:, n], atol=1e-10, rtol=1e-8)


def test_letting_everything_move_is_what_the_tower_does(base, x):
    _, stream, *_ = inside(base, x, 1)
    delta = 0.3 * torch.randn_like(stream[1])
    block = base.model.visual.transformer.resblocks[1]
    handle = block.register_forward_hook(lambda _, __, out: out + delta)
    with torch.no_grad():
        moved = base.model.visual(x)
    handle.remove()
    with torch.no_grad():
        plain = base.model.visual(x)
    torch.testing.assert_close(follow(base, 1, stream[1], delta, MOVES), moved - plain, atol=1e-10, rtol=1e-8)
    with pytest.raises(Invalid, match="everything"):
        follow(base, 1, stream[1], delta, ["everything"])


# ---- directions --------------------------------------------------------------------------------------------------


def plain_directions(phi, keep):
    """The paper's procedure on phi (B, N, k) itself."""
    centred = phi - phi.mean(0)
    out = []
    for n in range(phi.shape[1]):
        norm = centred[:, n].norm(dim=1)
        order = norm.argsort(descending=True)[:keep]
        _, sv, v = torch.linalg.svd(centred[order, n], full_matrices=False)
        x = centred[order, n] @ v[0]
        sign = 1.0 if int((x > 0).sum()) > keep // 2 else -1.0
        out.append((sign * v[0], norm[order[-1]], order, sv.square()[:3] / sv.square().sum()))
    return out


@pytest.fixture(scope="module")
def many(base):
    x = torch.randn(90, 3, 32, 32, generator=torch.Generator().manual_seed(4)).double()
    return scalars(look(base, x, [1]), 1)


def test_directions_are_the_papers(base, many):
    at = lens(base, 1)
    known = directions(at, many.split(16), keep=7)
    phi = effects(at, many)
    for n, (v, tau, order, share) in enumerate(plain_directions(phi, 7)):
        if not known.exact[n]:
            continue
        assert known.picture[n].tolist() == order.tolist()
        torch.testing.assert_close(known.direction[n], v, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(known.threshold[n], tau)
        torch.testing.assert_close(known.explained[n], share)
    print(f"proved: {float(known.exact.double().mean()):.2f}")
    assert float(known.exact.double().mean()) > 0.5
    centred = phi - phi.mean(0)
    x = torch.einsum("bnk,nk->bn", centred, known.direction)
    torch.testing.assert_close(known.projections(many), x, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(known.explained_all, x.square().sum(0) / centred.square().sum((0, 2)))
    torch.testing.assert_close(known.spread, centred.square().sum(2).mean(0).sqrt())
    parts = torch.einsum("bgn,ngk->gbnk", many, at.write())
    var = (parts - parts.mean(1, keepdim=True)).square().mean(1).sum(2).T  # (N, G)
    torch.testing.assert_close(known.carriers, var / var.sum(1, keepdim=True), atol=1e-9, rtol=1e-6)


def test_directions_are_unit_and_do_not_depend_on_order_or_batches(base, many):
    at = lens(base, 1)
    one = directions(at, many.split(16), keep=7)
    order = torch.randperm(len(many), generator=torch.Generator().manual_seed(0))
    two = directions(at, many[order].split(23), keep=7)
    both = one.exact & two.exact
    torch.testing.assert_close(one.direction[both], two.direction[both], atol=1e-8, rtol=1e-6)
    assert torch.equal(one.picture[both], order[two.picture[both]])
    torch.testing.assert_close(one.direction.norm(dim=1), torch.ones(N).double())
    assert bool(((one.projection > 0).sum(1) > 3).all())


def test_what_cannot_be_proved_is_not_claimed(base, many):
    """Whatever the first batch was: where `exact`, no picture is missing; with room for all, it always is."""
    at = lens(base, 1)
    phi = effects(at, many)
    norm = (phi - phi.mean(0)).norm(dim=2)  # (B, N)
    for size in (1, 8, 45):
        moments = EffectMoments(at, keep=5, spare=2)
        for part in many.split(size):
            moments.add(part)
        known = moments.result()
        want = norm.topk(5, 0).indices.T
        assert torch.equal(known.picture[known.exact], want[known.exact])
    assert bool(directions(at, many.split(30), keep=90).exact.all())


def test_a_stream_without_pictures_is_refused(base):
    with pytest.raises(Invalid, match="empty"):
        directions(lens(base, 1), [])
    with pytest.raises(Invalid, match="keep=0"):
        EffectMoments(lens(base, 1), keep=0)


def test_replacements_are_those_of_the_effects(base, many):
    at = lens(base, 1)
    known = directions(at, many.split(16), keep=4)
    phi = effects(at, many)
    centred = phi - phi.mean(0)
    large = centred.norm(dim=2) >= known.threshold * (1 - 1e-5)
    x = torch.einsum("bnk,nk->bn", centred, known.direction)[..., None]
    want = {
        "mean": -centred,
        "significant": -centred * large[..., None],
        "insignificant": -centred * ~large[..., None],
        "rank1": x * known.direction - centred,
    }
    for how, each in want.items():
        torch.testing.assert_close(replaced(at, known, many, how), each.sum(1), atol=1e-9, rtol=1e-7)
    some = torch.arange(N) % 3 == 0
    torch.testing.assert_close(replaced(at, known, many, "mean", some), -centred[:, some].sum(1), atol=1e-9, rtol=1e-7)
