"""Heads that are found and named: a planted one, edits that are chosen by rule, evidence that is sealed."""

import json
from dataclasses import replace

import pytest
import torch

from patches.families import clip
from patches.families.clip import maps as heatmap
from patches.families.clip.direct import Lens
from patches.mechanisms.heads import HeadConfig, HeadEdit
from registry import manifest
from registry.errors import ConfigError
from training import clip_heads, run
from training.clip_heads import RECIPES, Findings, random_heads
from training.clip_heads import names as labels
from training.lab.probes import PROBES, Probe
from training.tasks.textspan import Moments, moments, spans

TINY = RECIPES["tiny"]
WORDS = (
    "red",
    "a red square",
    "green",
    "blue",
    "a cat",
    "a dog",
    "the sea",
    "a house",
    "a tree",
    "a car",
    "bread",
    "rain",
)
TAXONOMY = {"colour": ("red", "green", "blue"), "animal": ("cat", "dog"), "thing": ("house", "tree", "car", "bread")}
PLANTED = (2, 1)


@pytest.fixture(scope="module")
def planted():
    """A tiny CLIP, by hand: a token is its patch's mean colour, head 2.1 reads how red it is everywhere and writes the
    embedding of "red", nothing else does anything."""
    base = clip.tiny()
    visual = base.model.visual
    with torch.no_grad():
        visual.conv1.weight.zero_()
        for c in range(3):
            visual.conv1.weight[c, c] = 1 / 64
            visual.conv1.weight[3 + c, c] = -1 / 64  # so that tokens have mean 0 over features
        visual.positional_embedding.zero_()
        visual.class_embedding.zero_()
        visual.class_embedding[6:8] = torch.tensor([1.0, -1.0])
        for ln in (visual.ln_pre, visual.ln_post, *(b.ln_1 for b in visual.transformer.resblocks)):
            ln.weight.fill_(1)
            ln.bias.zero_()
        for block in visual.transformer.resblocks:
            for p in (block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.out_proj.weight,
                      block.attn.out_proj.bias, block.mlp.c_proj.weight, block.mlp.c_proj.bias):  # fmt: skip
                p.zero_()
        layer, h = PLANTED
        attn = visual.transformer.resblocks[layer].attn
        attn.in_proj_weight[64 + 8 * h, :3] = torch.tensor([1.0, -0.5, -0.5])  # queries and keys are 0: it looks evenly
        t = clip.embed_texts(base, ["red"])[0]
        way = Lens(base).readout.map
        attn.out_proj.weight[:, 8 * h] = 3 * (t @ torch.linalg.pinv(way))
    return base


def squares(n=64, seed=0):
    """Pictures (n, 3, 32, 32) of a square of patches on another colour, and where the red ones are red (n, 32, 32)."""
    g = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2], [0.5, 0.5, 0.4]])
    x, masks = torch.empty(n, 3, 32, 32), torch.zeros(n, 32, 32, dtype=torch.bool)
    for i in range(n):
        ground = colours[1 + int(torch.randint(3, (), generator=g))]
        square = colours[0] if i % 2 == 0 else colours[1 + int(torch.randint(3, (), generator=g))]
        x[i] = ground[:, None, None]
        size = 8 * int(torch.randint(2, 4, (), generator=g))
        top, left = (8 * int(torch.randint(0, 5 - size // 8, (), generator=g)) for _ in range(2))
        x[i, :, top : top + size, left : left + size] = square[:, None, None]
        if i % 2 == 0:
            masks[i, top : top + size, left : left + size] = True
    return x, masks


def test_a_planted_head_is_found_and_named(planted):
    lens = Lens(planted)
    x, _ = squares()
    R = clip.embed_texts(planted, WORDS)
    seen = moments(lens, x.split(16), [0, 1, 2])
    found = spans(seen, R, 5)
    fits = labels.by_keyword(WORDS, TAXONOMY)
    by = {(s.layer, s.head): s for s in found}
    assert by[PLANTED].texts[0] == WORDS.index("red")
    assert by[PLANTED].share[0] > 0.99
    assert all(s.texts == () for at, s in by.items() if at != PLANTED)
    named = {(n.layer, n.head): n.label for n in labels.label(found, fits, tuple(TAXONOMY), "keyword", least=1.0)}
    assert named.pop(PLANTED) == "colour"
    assert set(named.values()) == {labels.NONE}


def test_a_planted_head_segments_what_it_reads(planted):
    lens = Lens(planted)
    x, masks = squares()
    t = clip.embed_texts(planted, ["red"])
    red = masks.any((1, 2))
    for heads in ([PLANTED], None):
        got = heatmap.mask(heatmap.grid(lens, x[red], t, heads)[:, 0], "half", 32)
        iou = (got & masks[red]).sum((1, 2)) / (got | masks[red]).sum((1, 2))
        assert iou.mean() > 0.9
    raw = heatmap.mask(heatmap.attention(lens, x[red]), "half", 32)  # it looks evenly, so attention says nothing
    assert ((raw & masks[red]).sum((1, 2)) / (raw | masks[red]).sum((1, 2))).mean() < 0.5


def test_silencing_the_planted_head_takes_its_text_away(planted):
    x, masks = squares()
    t = clip.embed_texts(planted, ["red"])[0]
    before = Lens(planted).read(x)
    with HeadEdit(HeadConfig(clip.SITES["heads"], (PLANTED,), 4, "zero", "cls"), {}).apply(planted.model):
        after = Lens(planted).read(x)
    red = masks.any((1, 2))
    said = before.heads.sum((1, 2)) @ t
    assert said[red].mean() > said[~red].mean() + 2
    assert after.heads.abs().max() == 0


def test_heads_of_a_property_come_named_first_then_by_score():
    score = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 5.0]]])
    named = [labels.Named(7, h, x, "", 0.0, 0.0) for h, x in enumerate(("a", "none", "b"))]
    zero, none = torch.zeros(1, 3, 2), torch.zeros(0, 2)
    seen = Moments(2, zero, zero, (7,))
    f = Findings((), ("a", "b"), none.bool(), none, seen, [], named, score, torch.ones(1, 3, 2), [], {})
    assert f.heads("a") == [(7, 0), (7, 1), (7, 2)]
    assert f.heads("b") == [(7, 2), (7, 0), (7, 1)]
    also = replace(f, p=torch.tensor([[[1.0, 1.0], [1.0, 0.01], [1.0, 0.0]]]))
    assert also.heads("b") == [(7, 2), (7, 1), (7, 0)]
    with pytest.raises(ConfigError, match="no property 'c'"):
        f.heads("c")


def test_random_heads_are_others_of_the_same_layers():
    every = [(layer, h) for layer in range(3) for h in range(4)]
    mine = [(0, 1), (2, 0), (2, 3)]
    drawn = [random_heads(mine, every, seed) for seed in range(20)]
    for heads in drawn:
        assert not set(heads) & set(mine)
        assert [layer for layer, _ in heads] == [0, 2, 2]
        assert len(set(heads)) == 3
    assert len({tuple(h) for h in drawn}) > 5


def test_pool_and_taxonomy_belong_together(tiny_clip, tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        clip_heads.find(tiny_clip, replace(TINY, pool=str(tmp_path / "p.txt")))
    (tmp_path / "p.txt").write_text("\n".join(WORDS))
    (tmp_path / "t.json").write_text(json.dumps({k: list(v) for k, v in TAXONOMY.items()} | {"nothing": ["zzz"]}))
    f = clip_heads.find(tiny_clip, replace(TINY, pool=str(tmp_path / "p.txt"), taxonomy=str(tmp_path / "t.json")))
    assert f.properties == ("colour", "animal", "thing")
    assert len(f.named) == 12
    assert set(f.judges) == {"spectrum", "keyword", "embedding"}


def test_a_language_model_without_a_persons_examples_is_shown_texts_of_every_property(monkeypatch):
    seen = []

    class Judge:
        def __init__(self, endpoint, examples):
            seen.append(examples)

        def name(self, texts):
            return "animal" if "cat" in texts else "whatever"

    monkeypatch.setattr(clip_heads, "Model", Judge)
    pool = ["cat", "dog", "owl", "red", "blue", "green"]
    fits = torch.tensor([[1, 0]] * 3 + [[0, 1]] * 3).bool()
    spans_ = [clip_heads.Span(0, h, (i, 3), (0.5, 0.2), 0.1, 2, 1.0) for h, i in enumerate((0, 4))]
    named = clip_heads._asked(TINY, spans_, pool, ["Animals", "colour"], fits)
    assert [n.label for n in named] == ["Animals", "whatever"]
    assert [(set(texts), name) for texts, name in seen[0]] == [
        ({"cat", "dog", "owl"}, "Animals"), ({"red", "blue", "green"}, "colour")]  # fmt: skip
    own = ((("cat", "dog"), "pets"),)
    clip_heads._asked(replace(TINY, examples=own), spans_, pool, ["Animals", "colour"], fits)
    assert seen[1] == list(own)


def test_what_was_found_and_who_changed_it_is_sealed(tmp_path):
    changes = tmp_path / "changes.json"
    changes.write_text(
        json.dumps([{"layer": 1, "head": 2, "label": "text", "who": "ann", "why": "looked", "at": "2026-01-01"}])
    )
    folder = run.fit("clip_heads/tiny", [f"changes={changes}", "draws=1"])
    about = manifest.read(folder)
    assert {"heads.json", "report.json", "means.safetensors", "gallery/gallery.safetensors"} <= about.files.keys()
    found = json.loads((folder / "heads.json").read_text())
    assert len(found["heads"]) == 12
    (row,) = [h for h in found["heads"] if (h["layer"], h["head"]) == (1, 2)]
    assert (row["label"], row["source"]) == ("text", "human")
    assert found["trail"][0]["who"] == "ann"
    assert found["metrics"]["kappa"]["spectrum"] <= 1.0
    fitted = json.loads((folder / "report.json").read_text())
    assert fitted["chosen"]["worth"] == max(r["worth"] for r in fitted["candidates"])
    assert len(fitted["random"][0]["heads"]) == fitted["chosen"]["count"]
    got = clip_heads.report(folder, tmp_path / "report.json")
    assert set(got["arms"]) == {"base", "clip_heads", "random 0"}
    assert got["arms"]["base"]["test"]["clean"][3] == TINY.test_images
    assert set(PROBES) <= got["properties"].keys()


def test_the_planted_head_carries_the_answer_and_nothing_else_does(planted):
    """Reds of any shade against blues: what tells them apart in the embedding is head 2.1."""
    words = clip.embed_texts(planted, ["red", "blue"])
    image = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    image[:, 0] = torch.arange(150, 246, 12)[:, None, None]
    got = clip_heads.carriers(Lens(planted), Probe(image, words.T, torch.zeros(8, dtype=torch.long)))
    assert got["heads"] + got["mlps"] + got["constants"] == pytest.approx(1, abs=1e-3)
    assert tuple(got["best"][0][:2]) == PLANTED
    assert got["best"][0][2] == pytest.approx(got["heads"], abs=1e-3)


@pytest.mark.parametrize("name", PROBES)
def test_probes_ask_what_the_base_knows_nothing_of_by_chance(tiny_clip, name):
    probe = PROBES[name](tiny_clip, "test", 12, 0)
    assert len(probe.image) == len(probe.right) == 12
    assert int(probe.right.max()) < probe.answers.shape[1]
    assert probe.open is None or probe.open[torch.arange(12), probe.right].all()
    assert 0 <= probe.share(tiny_clip) <= 1
