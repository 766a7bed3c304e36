"""Feature cards say what the dictionary does."""

import pytest
import torch

from patches.engine.read import record
from patches.evidence.feature_cards import load_cards, save_cards
from patches.families import clip
from patches.mechanisms.features import SAE
from training.clip_sae import cards
from training.lab import worlds


def test_a_card_holds_the_pictures_a_feature_fires_most_on(tiny_clip, tmp_path):
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(30, 32, generator=g), dim=1)
    sae = SAE(W, -torch.rand(30, generator=g), W, torch.zeros(32))
    data, site, words = worlds.WORLDS["imagenet"]("train", 21, 0), clip.site("block", 1), ["cat", "dog", "sun"]
    made = cards.make_cards(tiny_clip, sae, site, data, words, pictures=4, kept=2, batch=8)
    with record(tiny_clip.model, [site]) as acts:
        clip.embed_images(tiny_clip, data.read(range(21)).image)
    f = torch.cat([sae.encode(x) for x in acts[site]])  # (n, T, F)
    torch.testing.assert_close(made.density, (f > 0).float().mean((0, 1)))
    torch.testing.assert_close(made.largest, f.amax((0, 1)))
    for j in range(30):
        top = f[..., j].amax(1).topk(4)
        assert made.picture[j].tolist() == [int(i) if v > 0 else -1 for v, i in zip(*top, strict=True)]
        for p, a, t in zip(made.picture[j], made.activation[j], made.token[j], strict=True):
            if p >= 0:
                assert float(f[p, t, j]) == pytest.approx(float(a), rel=1e-5)
    save_cards(made, tmp_path)
    again = load_cards(tmp_path)
    assert [again.card(j) for j in range(30)] == [made.card(j) for j in range(30)]


def test_a_planted_word_is_named(tiny_clip):
    """A feature whose decoder row gives a word's own direction in the joint space."""
    words = ["cat", "a dog", "sunshine", "ink 77"]
    text = clip.embed_texts(tiny_clip, words, clip.TEMPLATES)
    visual = tiny_clip.model.visual
    target = text[2] - text.mean(0)
    rows = torch.linalg.lstsq(visual.proj.T.detach(), target[:, None]).solution[:, 0] / visual.ln_post.weight.detach()
    rows = rows - rows.mean()
    W = torch.nn.functional.normalize(torch.stack([rows, torch.randn(32)]), dim=1)
    sae = SAE(W, torch.zeros(2), W, torch.zeros(32))
    made = cards.make_cards(
        tiny_clip, sae, clip.site("block", 2), worlds.WORLDS["imagenet"]("train", 4, 0), words, kept=4
    )
    assert made.card(0)["words"][0]["word"] == "sunshine"
