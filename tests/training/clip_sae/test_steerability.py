import pytest
import torch

from patches.engine.read import record
from patches.families import clip
from patches.mechanisms.features import SAE, edit
from training.clip_sae.steerability import after_block, after_last_block, probabilities, rest

D, F, B, V = 32, 40, 6, 11


@pytest.fixture
def case(tiny_clip):
    """Images, their streams after every block, a dictionary, a vocabulary."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, 32, 32, generator=g)
    sites = [clip.site("block", i) for i in range(3)]
    with torch.inference_mode(), record(tiny_clip.model, sites) as acts:
        tiny_clip.model(image=images)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    sae = SAE(W, 0.1 * torch.randn(F, generator=g), W, torch.zeros(D))
    words = torch.nn.functional.normalize(torch.randn(V, 24, generator=g), dim=1)
    return images, [acts[s][0] for s in sites], sae, words


def by_hand(base, images, site, sae, value, words, tokens="all"):
    """The definition: per feature a patch, a full forward, the mean shift."""
    scale = clip.logit_scale(base)
    with torch.inference_mode():
        before = probabilities(base.model(image=images)["image_features"], words, scale)
        deltas = []
        for j in range(len(sae.bias)):
            with edit(sae, site, [j], "clamp", value, tokens).apply(base.model):
                after = probabilities(base.model(image=images)["image_features"], words, scale)
            deltas.append((after - before).mean(0))
    return torch.stack(deltas)


@pytest.mark.parametrize("tokens", ["all", "cls"])
def test_the_closed_form_is_the_full_forward_with_the_patch(tiny_clip, case, tokens):
    """After the last block clamping every token and clamping the class token are the same thing, and both are this."""
    images, streams, sae, words = case
    cls = streams[2][:, 0]
    got = after_last_block(tiny_clip, cls, sae.decoder, sae.encode(cls), 3.0, words, cells=200)
    delta = by_hand(tiny_clip, images, clip.site("block", 2), sae, 3.0, words, tokens)
    torch.testing.assert_close(got.score, delta.square().sum(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.power, delta.amax(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(got.concept, delta.argmax(1))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("cls_only", [False, True])
def test_the_rest_of_the_tower_is_the_full_forward_with_the_patch(tiny_clip, case, layer, cls_only):
    images, streams, sae, words = case
    z = streams[layer]
    f = sae.encode(z)
    got = after_block(tiny_clip, layer, z, sae.decoder, lambda at: f[..., at], 3.0, words, 4 * B, cls_only)
    tokens = "cls" if cls_only else "all"
    delta = by_hand(tiny_clip, images, clip.site("block", layer), sae, 3.0, words, tokens)
    torch.testing.assert_close(got.score, delta.square().sum(1), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(got.power, delta.amax(1), atol=1e-5, rtol=1e-3)


def test_both_ways_agree_after_the_last_block_for_neurons_too(tiny_clip, case):
    """A neuron is a dimension of the stream: the dictionary is the identity."""
    _, streams, _, words = case
    z = streams[2]
    value = torch.linspace(-4, 4, D)
    closed = after_last_block(tiny_clip, z[:, 0], torch.eye(D), z[:, 0], value, words)
    ran = after_block(tiny_clip, 2, z, torch.eye(D), lambda at: z[..., at], value, words)
    torch.testing.assert_close(closed.score, ran.score, atol=1e-5, rtol=1e-3)
    assert torch.equal(closed.concept, ran.concept)


def test_the_rest_of_the_tower_is_the_tower(tiny_clip, case):
    images, streams, _, _ = case
    with torch.inference_mode():
        want = tiny_clip.model.visual(images)
        for layer, z in enumerate(streams):
            torch.testing.assert_close(rest(tiny_clip, z, layer), want, atol=1e-5, rtol=1e-5)


def test_probabilities_sum_to_one_and_scores_stay_below_two(tiny_clip, case):
    _, streams, sae, words = case
    cls = streams[2][:, 0]
    got = after_last_block(tiny_clip, cls, sae.decoder, sae.encode(cls), 1e4, words)
    p = probabilities(cls[:, :24], words, 100.0)
    torch.testing.assert_close(p.sum(1), torch.ones(B))
    assert (got.score <= 2).all()
    assert (got.power <= 1).all()
    assert got.power.max() > 0.3


def test_a_feature_that_writes_a_word_has_it_as_its_concept(tiny_clip, case):
    """Planted: a row that the head maps onto one word's embedding steers to that word, and counts once in coverage."""
    _, streams, _, words = case
    visual = tiny_clip.model.visual
    toward = torch.linalg.pinv(visual.ln_post.weight[:, None] * visual.proj).T @ words[7]
    rows = torch.stack([toward, 2 * toward, torch.zeros(D)])
    cls = streams[2][:, 0]
    got = after_last_block(tiny_clip, cls, rows, torch.zeros(B, 3), 200.0, words)
    assert got.concept[:2].tolist() == [7, 7]
    assert got.score[2] < 1e-12
    summary = got.summary()
    assert summary["steerable"] == 2
    assert summary["coverage"] == 1


def test_steering_nothing_moves_nothing(tiny_clip, case):
    _, streams, sae, words = case
    cls = streams[2][:, 0]
    f = sae.encode(cls)[:1]
    got = after_last_block(tiny_clip, cls[:1], sae.decoder, f, f[0], words)
    assert got.score.max() < 1e-10
