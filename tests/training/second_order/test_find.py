"""Ranking neurons, controls, pools of texts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.families.clip.second_order import lens, look, scalars
from registry.errors import Invalid, NotFound
from tests.training.second_order.some import TINY, WORDS
from training.second_order.find import margins, matched_control, patch_of, rank, read, texts_of
from training.tasks.recognition import classifier, pictures


def test_neurons_are_ranked_by_what_they_add_to_the_written_word(tiny_clip):
    """The closed form against effects themselves, pair by pair."""
    from patches.families.clip.second_order import effects

    data = {k: d for k, d in pictures(TINY, "train", 12).items() if k != "blank"}
    weights, at = classifier(tiny_clip, TINY, data["clean"]).weights, lens(tiny_clip, 1)
    found = rank(tiny_clip, TINY, {1: at}, data)[1]
    mean = []
    hit = data["attacked"].read(range(12))
    way = weights.T[hit.extras["word_label"]] - weights.T[hit.label]  # (n, k)
    for name in ("attacked", "clean"):
        seen = look(tiny_clip, tiny_clip.processor.image(data[name].read(range(12)).image), [1])
        phi = effects(at, scalars(seen, 1)) / seen.y.norm(dim=1)[:, None, None]
        mean.append(torch.einsum("bnk,bk->bn", phi, way).mean(0))
    torch.testing.assert_close(found.pull, mean[0] - mean[1], atol=1e-5, rtol=1e-3)
    assert bool((found.pull[found.order].diff() <= 0).all())


def test_of_groups_the_place_counts_and_the_label_does_not(tiny_clip):
    config = replace(TINY, task="waterbirds")
    data = pictures(config, "train", 40)
    at = lens(tiny_clip, 1)
    weights = classifier(tiny_clip, config, data["clean"]).directions
    got = margins(tiny_clip, config, {1: at}, data["clean"], weights)
    m = got.m[1]
    by = [(m[x == 1].mean(0) - m[x == 0].mean(0)).abs() for x in (got.other, got.label)]
    torch.testing.assert_close(rank(tiny_clip, config, {1: at}, data)[1].pull, by[0] - by[1])


def test_the_control_is_as_many_other_neurons_of_like_spread(tiny_clip):
    cards, _ = read(tiny_clip, TINY, WORDS)
    known = cards.layers[1].known
    chosen = known.spread.argsort()[45:75].tolist()
    other = matched_control(known, chosen, 0)
    assert len(set(other)) == 30
    assert not set(other) & set(chosen)
    assert float(known.spread[other].sum()) == pytest.approx(float(known.spread[chosen].sum()), rel=0.25)


def test_what_is_edited_is_what_was_ranked(tiny_clip):
    cards, lenses = read(tiny_clip, TINY, WORDS)
    found = rank(tiny_clip, TINY, lenses, {k: d for k, d in pictures(TINY, "train", 8).items() if k != "blank"})
    known = cards.layers[1].known
    effects_, fire = (patch_of(tiny_clip, 1, lenses[1], known, found[1], [4, 2], e) for e in ("effects", "activations"))
    assert (effects_.config.path, fire.config.path) == ("second_order", "all")
    torch.testing.assert_close(effects_.tensors["mean"], found[1].effect_mean[[4, 2]])
    torch.testing.assert_close(fire.tensors["mean"], found[1].fire_mean[[4, 2]])


def test_any_file_of_texts_is_a_pool(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("red \n\nblue\nred\n")
    data = pictures(TINY, "train", 4)["clean"]
    assert texts_of(replace(TINY, pool=str(file)), data) == ("red", "blue")
    assert len(texts_of(TINY, data)) > 1000
    with pytest.raises(NotFound, match="txt"):
        texts_of(replace(TINY, pool=str(tmp_path / "words.csv")), data)
    (tmp_path / "one.txt").write_text("red\n")
    with pytest.raises(Invalid, match="1 different"):
        texts_of(replace(TINY, pool=str(tmp_path / "one.txt")), data)
