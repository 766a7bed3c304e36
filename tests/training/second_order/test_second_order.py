"""The system: a planted neuron is found, named and segments; what is chosen is chosen on val; cards are kept."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from patches import artifact
from patches.engine.read import record
from patches.evidence.neuron_cards import (
    Layer,
    NeuronCards,
    Reader,
    attributes,
    load_neurons,
    mine,
    save_neurons,
    segment,
    voters,
)
from patches.families import clip
from patches.families.clip import maps as heatmap
from patches.families.clip.second_order import directions, lens, look, scalars
from patches.mechanisms.neurons import NeuronEdit
from registry.errors import BadArtifact, Invalid, NotFound
from training import second_order
from training.lab import worlds
from training.second_order import RECIPES, alike, fit, margins, patch_of, rank, read
from training.second_order.omp import atoms, pursue
from training.tasks import segmentation
from training.tasks.recognition import classifier, pictures

TINY = RECIPES["tiny"]
LAYER, NEURON, LAST = 0, 5, 1
WORDS = ("red", "cat", "dog", "sun", "ink", "sea", "fox", "owl")
RED, OTHERS = (230, 20, 20), ((20, 200, 40), (30, 60, 220), (240, 240, 240))


def colours(n=24, seed=0):
    """(n, 3, 32, 32) uint8: 4 x 4 patches of other colours with a red block on 2 x 2 of them; (n, 32, 32) bool."""
    g = torch.Generator().manual_seed(seed)
    other = torch.tensor(OTHERS)[torch.randint(3, (n, 4, 4), generator=g)]
    mask = torch.zeros(n, 4, 4, dtype=torch.bool)
    for i in range(n):
        r, c = torch.randint(3, (2,), generator=g).tolist()
        mask[i, r : r + 2, c : c + 2] = True
    image = torch.where(mask[..., None], torch.tensor(RED), other).permute(0, 3, 1, 2)
    big = image.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return big.to(torch.uint8), mask.repeat_interleave(8, 1).repeat_interleave(8, 2)


@pytest.fixture(scope="module")
def planted():
    """A random tower of two blocks; neuron 5 of the first fires on red patches alone, and one head of the second brings
    what it writes to the text "red"."""
    base = clip.tiny(layers=2)
    base = replace(base, model=deepcopy(base.model))
    blocks, visual = base.model.visual.transformer.resblocks, base.model.visual
    x = base.processor.image(colours()[0])
    red = atoms(clip.embed_texts(base, WORDS, clip.TEMPLATES))[0]
    with torch.no_grad():
        with record(base.model, ["visual.transformer.resblocks.0.ln_2"]) as acts:
            base.model(image=x)
        z = acts["visual.transformer.resblocks.0.ln_2"][0]
        is_red = torch.nn.functional.max_pool2d(colours()[1][:, None].float(), 8)[:, 0].flatten(1).bool()
        patches = z[:, 1:].reshape(-1, 32)
        want = torch.where(is_red.flatten(), 4.0, -4.0)
        design = torch.cat([patches, torch.ones(len(patches), 1)], 1)
        row = torch.linalg.lstsq(design, want[:, None]).solution[:, 0]
        blocks[0].mlp.c_fc.weight[NEURON], blocks[0].mlp.c_fc.bias[NEURON] = row[:-1], row[-1]
        # head 0 of the last block: even attention, and value 0 is what neuron 5 writes
        attn, D, e = blocks[LAST].attn, 32, 8
        way = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator().manual_seed(3)), dim=0)
        way = torch.nn.functional.normalize(way - way.mean(), dim=0)
        blocks[0].mlp.c_proj.weight[:, NEURON] = way
        attn.in_proj_weight[:e], attn.in_proj_bias[:e] = 0, 0  # queries of head 0
        value = attn.in_proj_weight[2 * D :]
        seen = blocks[LAST].ln_1.weight * way
        value -= torch.outer(value @ seen, seen) / seen.dot(seen)  # nobody else reads it
        value[0] += seen / seen.dot(seen)
        to_y = visual.ln_post.weight[:, None] * visual.proj
        to_y = to_y - to_y.mean(0)
        attn.out_proj.weight[:, 0] = torch.linalg.lstsq(to_y.T, red[:, None]).solution[:, 0]
    return base


@pytest.fixture(scope="module")
def reader(planted):
    images, _ = colours(40, 1)
    x = planted.processor.image(images)
    seen, at = look(planted, x, [LAYER]), lens(planted, LAYER)
    known = directions(at, [scalars(seen, LAYER)], keep=8)
    pool = clip.embed_texts(planted, WORDS, clip.TEMPLATES)
    said = pursue(known.direction, atoms(pool), 3)
    rest = seen.p[LAYER].mean((0, 1))
    one = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    return Reader.of(planted, NeuronCards({LAYER: one}, WORDS, pool, images))


# ---- planted truth -----------------------------------------------------------------------------------------------


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
    maps = segment(reader, planted.processor.image(images), red, 1, vote)[:, 0]
    said = heatmap.mask(maps if vote == "raw" else sign * maps, "half", 32)
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


# ---- cards -------------------------------------------------------------------------------------------------------


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


# ---- the fit -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The tiny recipe, fitted with every split but train and val out of reach; its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as m:
        for name, world in worlds.WORLDS.items():

            def guarded(split, *args, world=world, **more):
                assert split in ("train", "val"), "fitting must not see this split"
                return world(split, *args, **more)

            m.setitem(worlds.WORLDS, name, guarded)
        fit(TINY, folder)
    return folder


def test_a_fit_sees_train_and_val_alone_and_seals_its_evidence(fitted):
    _, patch = artifact.load(fitted)
    assert isinstance(patch, NeuronEdit)
    report = json.loads((fitted / "report.json").read_text())
    rows = report["candidates"]
    assert report["chosen"]["worth"] == max(r["worth"] for r in rows)
    assert len(patch.config.neurons) == report["chosen"]["count"] == len(report["random"]["neurons"])
    assert not set(patch.config.neurons) & set(report["random"]["neurons"])
    assert {(r["layer"], r["edit"], r["count"]) for r in rows} == {
        (layer, e, n) for layer in (0, 1) for e in ("effects", "activations") for n in (4, 32)
    }
    cards = load_neurons(fitted)
    assert set(cards.layers) == {0, 1}
    for layer in ("0", "1"):
        asked = report["questions"]["layers"][layer]
        assert sum(asked["explained"]["histogram"]) == 128
        for kind in ("heavy", "random"):
            steps = asked["paths"][kind]["steps"]
            assert set(steps) == {"norms", "patterns", "hops", "mlps", "direct"}
            assert steps["direct"]["energy"] == pytest.approx(1.0)
        shares = report["questions"]["ablations"]["layers"][layer]
        assert 0 < shares["counts_share"] < 1


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
    other = alike(known, chosen, 0)
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
    assert second_order.texts_of(replace(TINY, pool=str(file)), data) == ("red", "blue")
    assert len(second_order.texts_of(TINY, data)) > 1000
    with pytest.raises(NotFound, match="txt"):
        second_order.texts_of(replace(TINY, pool=str(tmp_path / "words.csv")), data)
    (tmp_path / "one.txt").write_text("red\n")
    with pytest.raises(Invalid, match="1 different"):
        second_order.texts_of(replace(TINY, pool=str(tmp_path / "one.txt")), data)


# ---- masks -------------------------------------------------------------------------------------------------------


def test_neurons_stand_on_the_table_of_masks_beside_heads_and_attention(reader, planted):
    got = segmentation.table(planted, worlds.imagenet("test", 5), WORDS[:4], reader=reader)
    ways = [*(f"neurons, {vote}" for vote in segmentation.VOTES), "direct effects", "raw attention, last layer"]
    assert {way + cut for way in ways for cut in segmentation.CUTS} <= got.keys()
    assert all(row["iou"][2] == 5 and 0 <= row["iou"][0] <= 1 for row in got.values())


def test_no_candidate_leaves_too_few_neurons_for_its_control(planted):
    lenses = {LAYER: lens(planted, LAYER)}
    half = lenses[LAYER].neurons // 2
    tried = second_order.candidates(replace(TINY, counts=(4, half, half + 1)), lenses)
    assert {n for _, _, n in tried} == {4, half}
    assert {n for _, _, n in second_order.candidates(replace(TINY, counts=(half + 1,)), lenses)} == {half}
