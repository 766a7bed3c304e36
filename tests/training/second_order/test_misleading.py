"""Pictures composed to mislead: what is on them is what was asked for, and the filter says what it should."""

import pytest
import torch

from patches.evidence.neuron_cards import Layer, NeuronCards, Reader
from patches.families import clip
from patches.families.clip.second_order import directions, lens, look, scalars
from training.lab import atlas, worlds
from training.lab.renderer import GROUNDS, generator
from training.second_order.misleading import (
    WAYS,
    Drawable,
    attack,
    class_pairs,
    compose,
    drawn,
    indirect,
    passes,
    prefers,
    synonyms,
    words_for,
)
from training.second_order.omp import atoms, pursue

STYLES = worlds.STYLES["test"]
WORDS = ("cat", "dog", "fish", "key", "water", "grass", "banana", "owl", "a thing nobody drew")


@pytest.fixture(scope="module")
def reader(tiny_clip):
    images = worlds.WORLDS["imagenet"]("train", 12, 0).read(range(12)).image
    pool = clip.embed_texts(tiny_clip, WORDS, clip.TEMPLATES)
    seen = look(tiny_clip, tiny_clip.processor.image(images), [0, 1])
    layers = {}
    for n in (0, 1):
        known = directions(lens(tiny_clip, n), [scalars(seen, n)], keep=3)
        said = pursue(known.direction, atoms(pool), 4)
        rest = seen.p[n].mean((0, 1))
        layers[n] = Layer(known, said.index, said.coefficient, said.explained[:, -1], rest)
    return Reader.of(tiny_clip, NeuronCards(layers, WORDS, pool, images))


def test_what_the_lab_cannot_draw_is_left_out():
    can = Drawable.of(WORDS, STYLES)
    assert set(can.concept) == {"cat", "dog", "fish", "key", "banana", "owl"} & set(atlas.load().names)
    assert set(can.ground) == {"water", "grass"} & set(GROUNDS)
    assert "a thing nobody drew" not in can


def test_a_picture_shows_the_thing_and_two_of_the_words():
    can, lab = Drawable.of(WORDS, STYLES), atlas.load()
    scene, alone, shown = compose("cat", ["banana", "owl", "water"], can, 12, STYLES, generator("t"))
    for i, few in enumerate(shown):
        names = [lab.names[c] for c in scene.concept[i].tolist() if c >= 0]
        assert names[0] == "cat"
        assert sorted(names[1:]) == sorted(w for w in few if w in can.concept)
        if "water" in few:
            assert GROUNDS[int(scene.ground[i])] == "water"
        assert [lab.names[c] for c in alone.concept[i].tolist() if c >= 0] == ["cat"]
    plain, same, none = compose("cat", [], can, 4, STYLES, generator("t"))
    assert torch.equal(plain.image, same.image)
    assert none == [[]] * 4


def test_the_filter_keeps_what_shows_the_thing_and_not_the_wrong_class():
    can = Drawable.of(WORDS, STYLES)
    scene, alone, shown = compose("cat", ["banana", "owl"], can, 3, STYLES, generator("t"))
    assert bool(passes(scene, alone, shown, "dog", set()).all())
    assert not passes(scene, alone, shown, "owl", set()).any()
    assert not passes(scene, alone, shown, "dog", {"banana"}).any()
    scene.mask[:, 0] = False  # as if it were hidden
    assert not passes(scene, alone, shown, "dog", set()).any()


@pytest.mark.parametrize("way", WAYS[:-1])
def test_every_way_finds_drawable_words_that_name_neither_class(reader, way):
    can = Drawable.of(WORDS, STYLES)
    images = worlds.WORLDS["imagenet"]("test", 4, 0).read(range(4)).image
    found = words_for(reader, way, "cat", "dog", can, 3, 0, images, neurons=20)
    assert found
    assert all(w in can for w in found)
    assert not set(found) & {"cat", "dog"}
    assert found == words_for(reader, way, "cat", "dog", can, 3, 0, images, neurons=20)


def test_indirect_effects_are_slopes_of_the_answer(reader, tiny_clip):
    """The neuron ranked first moves <y, wrong - true> most when it is set to its mean, to first order."""
    images = worlds.WORLDS["imagenet"]("test", 6, 0).read(range(6)).image
    t, w = clip.embed_texts(tiny_clip, ["cat", "dog"], clip.TEMPLATES)
    chosen = indirect(reader, images, t, w, 10)
    assert sum(len(n) for _, n in chosen) == 10
    assert not any(m._forward_pre_hooks for m in tiny_clip.model.modules())
    x = tiny_clip.processor.image(images)

    def moved(layer, n):
        rest = reader.cards.layers[layer].rest[n]

        def hook(_, args):
            a = args[0].clone()
            a[..., n] = a[..., n] + 0.01 * (rest - a[..., n])
            return (a,)

        before = tiny_clip.model(image=x)["image_features"] @ (w - t)
        c_proj = tiny_clip.model.visual.transformer.resblocks[layer].mlp.c_proj
        handle = c_proj.register_forward_pre_hook(hook)
        after = tiny_clip.model(image=x)["image_features"] @ (w - t)
        handle.remove()
        return float((after - before).abs().mean())

    with torch.inference_mode():
        top = [moved(layer, int(n)) for layer, ns in chosen for n in ns[:3]]
        rest = [moved(layer, n) for layer in (0, 1) for n in range(0, 128, 16) if n not in dict(chosen)[layer].tolist()]
    assert min(top) > sorted(rest)[len(rest) // 2]


def test_an_attack_counts_every_way_on_every_pair(reader):
    got = attack(reader, pairs=2, n=4, words=3)
    assert list(got["ways"]) == list(WAYS)
    assert all(v["n_before"] == 8 and v["n_after"] <= 8 for v in got["ways"].values())
    assert len(got["pairs"]) == 2
    assert got["ways"] == attack(reader, pairs=2, n=4, words=3)["ways"]


def test_pairs_and_controls_are_drawn_once(reader, tiny_clip):
    data = worlds.WORLDS["imagenet"]("test", 4, 0)
    pairs = class_pairs(data, 10, 0)
    assert len({c for p in pairs for c in p}) == 20
    assert sum(len(n) for _, n in drawn(reader.cards, 30, generator("x"))) == 30
    assert "cat" in synonyms(reader.cards, reader.cards.pool[0])
    said = prefers(tiny_clip, data.read(range(4)).image, "cat", "dog")
    assert torch.equal(~said, prefers(tiny_clip, data.read(range(4)).image, "dog", "cat"))
