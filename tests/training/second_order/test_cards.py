"""What a planted neuron says: names, masks, attributes, mined words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from patches.evidence.neuron_cards import (
    attributes,
    load_neurons,
    mine,
    save_neurons,
    text_maps,
    voters,
)
from patches.families.clip import maps
from patches.families.clip.second_order import lens, look, scalars
from registry.errors import BadArtifact, Invalid, NotFound
from tests.training.second_order.some import LAST, LAYER, NEURON, OTHERS, RED, WORDS, colours
from training.lab import worlds
from training.second_order.omp import atoms
from training.tasks import segmentation


def test_the_planted_neuron_is_named(reader, planted):
    """Its direction is the text, found first of all; one head carries it; it is alone in saying so that well."""
    red = atoms(reader.cards.pool)[0]
    one = reader.cards.layers[LAYER]
    assert float((one.known.direction[NEURON] @ red).abs()) > 0.99
    assert int((one.known.direction @ red).abs().argmax()) == NEURON
    card = reader.cards.card(LAYER, NEURON, reader.heads())
    assert card["texts"][0]["text"] == "red"
    assert abs(card["texts"][0]["coefficient"]) > 0.95
    assert card["carriers"][0]["layer"] == LAST
    assert card["carriers"][0]["head"] == 0
    assert card["carriers"][0]["share"] > 0.99
    assert card["explained"][0] > 0.99


@pytest.mark.parametrize("vote", ["raw", "signed", "weighted"])
def test_the_planted_neuron_segments_what_it_means(reader, planted, vote):
    images, mask = colours(30, 2)
    red = atoms(reader.cards.pool)[:1]
    assert voters(reader.cards, red[0], 1)[0][1].tolist() == [NEURON]
    sign = float((reader.cards.layers[LAYER].known.direction[NEURON] @ red[0]).sign())
    voted = text_maps(reader, planted.processor.image(images), red, 1, vote)[:, 0]
    said = maps.mask(voted if vote == "raw" else sign * voted, "half", 32)
    iou = (said & mask).sum((1, 2)) / (said | mask).sum((1, 2))
    print(f"IoU of the planted neuron, {vote}: mean {float(iou.mean()):.3f}, least {float(iou.min()):.3f}")
    assert float(iou.min()) > 0.9


def test_a_picture_full_of_it_has_it_as_an_attribute(reader, planted):
    """Against its mean: a picture with far more red than usual says red, one with none says its opposite."""
    plain = torch.tensor(OTHERS[1]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    full = torch.tensor(RED).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    images = torch.cat([full, plain]).to(torch.uint8)
    one = replace(reader.cards.layers[LAYER])
    only = torch.zeros(len(one.told), dtype=torch.bool)
    only[NEURON] = True  # the other neurons are random, and shout
    quiet = replace(one, coefficient=one.coefficient * only[:, None])
    alone = replace(reader, cards=replace(reader.cards, layers={LAYER: quiet}))
    found, _ = attributes(alone, planted.processor.image(images), 4)
    assert (found[0][0].text, found[0][0].neurons[0][:2]) == ("red", (LAYER, NEURON))
    assert found[0][0].weight > 0
    said = {a.text: a.weight for a in found[1]}
    assert said.get("red", 0.0) <= 0


def test_a_neuron_that_speaks_for_the_wrong_class_is_mined(reader):
    """Of a pair whose difference is the planted direction, `red` is the word and neuron 5 the evidence."""
    t = reader.cards.pool[1]
    wrong = t + 0.5 * atoms(reader.cards.pool)[0]
    words, left = mine(reader.cards, t, wrong, 1, 3, synonym=2.0)
    assert words[0].text == "red"
    assert words[0].neurons[0][:2] == (LAYER, NEURON)
    assert not left
    assert "red" in mine(reader.cards, t, wrong, 1, 3, ["red fox"], 2.0)[1]
    assert mine(reader.cards, t, reader.cards.pool[0], 1, 3, synonym=0.99)[1] == ["red"]
    with pytest.raises(Invalid, match="neurons=1000"):
        mine(reader.cards, t, wrong, 1000)


def test_attribute_weights_are_the_sum_over_neurons_that_count(reader, planted):
    images, _ = colours(3, 5)
    x = planted.processor.image(images)
    one, at = reader.cards.layers[LAYER], lens(planted, LAYER)
    s = scalars(look(planted, x, [LAYER]), LAYER)
    counts = one.known.significant(one.known.centred(at, s)).T
    xs = one.known.projections(s) * counts
    found, n = attributes(reader, x, len(WORDS))
    assert n == counts.sum(1).tolist()
    for b in range(3):
        for a in found[b]:
            j = WORDS.index(a.text)
            want = sum(
                float(xs[b, i] * one.coefficient[i, k]) for i, k in zip(*torch.where(one.text == j), strict=True)
            )
            assert a.weight == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_cards_are_kept_with_the_pictures_they_show(reader, tmp_path):
    save_neurons(reader.cards, tmp_path, shown=3)
    again = load_neurons(tmp_path)
    for n in range(0, 128, 31):
        one, two = reader.cards.card(LAYER, n, 4), again.card(LAYER, n, 4)
        for a, b in zip(one["pictures"][:3], two["pictures"], strict=True):
            assert torch.equal(reader.cards.thumbs[a["picture"]], again.thumbs[b["picture"]])
            assert a["projection"] == b["projection"]
        assert {k: v for k, v in one.items() if k != "pictures"} == {k: v for k, v in two.items() if k != "pictures"}
    with pytest.raises(NotFound, match="0 to 127"):
        again.card(LAYER, 128, 4)
    with pytest.raises(NotFound, match="cards of layer 3"):
        again.layer(3)
    about = json.loads((tmp_path / "neurons.json").read_text())
    (tmp_path / "neurons.json").write_text(json.dumps({**about, "seen": {"4": 3}}))
    with pytest.raises(BadArtifact, match="lack"):
        load_neurons(tmp_path)
    with pytest.raises(NotFound, match="no neuron cards"):
        load_neurons(tmp_path / "nowhere")


def test_neurons_stand_on_the_table_of_masks_beside_heads_and_attention(reader, planted):
    got = segmentation.table(planted, worlds.imagenet("test", 5), WORDS[:4], reader=reader)
    ways = [*(f"neurons, {vote}" for vote in segmentation.VOTES), "direct effects", "raw attention, last layer"]
    assert {way + cut for way in ways for cut in segmentation.CUTS} <= got.keys()
    assert all(row["iou"][2] == 5 and 0 <= row["iou"][0] <= 1 for row in got.values())
