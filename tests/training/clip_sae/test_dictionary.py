"""Sparse autoencoders in training: gradients, activation functions, what ships."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.engine.read import record, upto
from tests.training.clip_sae.planted import METHODS, D, planted
from training.clip_sae.dictionary import Decode, Dictionary, Encode, activations, largest_of


@pytest.mark.parametrize("how", ["none", "scale", "layer_norm", "norm"])
def test_what_ships_computes_what_was_trained(how):
    """Folding the data set's scale, or storing the token's, changes no reconstruction."""
    chunks, _ = planted()
    x = chunks(0)
    inner = Dictionary(replace(METHODS["topk"], normalise=how), D)
    inner.start(x)
    inner.bias.data += 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(1))
    _, share, _ = inner(x)
    sae = inner.ship()
    n = inner.normal(x)
    f = sae.encode(x)
    back = inner.normal(sae.decode(f, x)) if how in ("none", "scale") else f @ sae.decoder + sae.decoder_bias
    torch.testing.assert_close((n - back).square().sum() / (n - n.mean(0)).square().sum(), share, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whole", [False, True], ids=["per token", "per batch"])
def test_sparse_gradients_are_the_dense_ones(whole):
    g = torch.Generator().manual_seed(3)
    x, noise = (
        torch.randn(200, D, generator=g, dtype=torch.double),
        torch.randn(200, D, generator=g, dtype=torch.double),
    )
    E, W = (torch.randn(96, D, generator=g, dtype=torch.double).requires_grad_() for _ in range(2))
    b = torch.randn(96, generator=g, dtype=torch.double).requires_grad_()
    values, rows, features = Encode.apply(x, E, b, 5, whole)
    (Decode.apply(values.relu(), rows, features, W, 200) - noise).square().sum().backward()
    sparse = [p.grad.clone() for p in (E, b, W)]
    for p in (E, b, W):
        p.grad = None
    pre = x @ E.T + b
    kth = pre.flatten().topk(1000).values[-1] if whole else pre.topk(5, 1).values[:, -1:]
    ((pre.relu() * (pre >= kth)) @ W - noise).square().sum().backward()
    for mine, dense in zip(sparse, (E.grad, b.grad, W.grad), strict=True):
        torch.testing.assert_close(mine, dense, atol=1e-9, rtol=1e-9)


def test_the_largest_of_many_are_found_whatever_their_order():
    g = torch.Generator().manual_seed(4)
    for flat in (torch.randn(200_000, generator=g), torch.arange(200_000.0), torch.zeros(200_000)):
        got = flat[largest_of(flat, 3000)].sort().values
        assert torch.equal(got, flat.topk(3000).values.sort().values)


@pytest.mark.parametrize("method", METHODS)
def test_auxiliary_gradients_reach_dead_features_and_only_then(method):
    x = planted()[0](0)
    for dead, reached in (("auxiliary", True), ("leave", False)):
        inner = Dictionary(replace(METHODS[method], dead=dead), D)
        inner.start(x)
        inner.bias.data[:20] -= 50.0
        inner.idle[:20] = 1000
        inner(x)[0].backward()
        assert bool(inner.decoder.grad[:20].any()) is reached
        assert bool(inner.encoder.grad[:20].any()) is reached
        assert inner.encoder.grad[20:].any()


def test_activations_end_at_the_site_and_keep_the_asked_tokens(tiny_clip):
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    site = "visual.transformer.resblocks.1"
    reached = []
    hook = tiny_clip.model.visual.transformer.resblocks[2].register_forward_hook(lambda *_: reached.append(1))
    try:
        x = upto(tiny_clip.model, [site], image=images)[site]
        mlp = "visual.transformer.resblocks.0.mlp"
        both = upto(tiny_clip.model, [mlp, site], image=images)
        with record(tiny_clip.model, [mlp]) as whole:
            upto(tiny_clip.model, [site], image=images)
        got = {
            w: activations(tiny_clip.model, site, lambda _: images, w, batch=4)(0) for w in ("all", "cls", "patches")
        }
    finally:
        hook.remove()
    assert not reached
    assert torch.equal(both[site], x)
    assert torch.equal(both[mlp], whole[mlp][0])
    torch.testing.assert_close(got["all"].view(x.shape), x)
    torch.testing.assert_close(got["cls"], x[:, 0])
    torch.testing.assert_close(got["patches"], x[:, 1:].reshape(-1, x.shape[-1]))
