"""A planted head is found and named; how heads of a property are ordered; pools and judges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from patches.families import clip
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from registry.errors import ConfigError
from tests.training.clip_heads.some import PLANTED, TAXONOMY, TINY, WORDS, squares
from training.clip_heads import find as finding
from training.clip_heads import names as labels
from training.clip_heads.find import Findings, asked_model, find
from training.tasks.textspan import HeadMoments, Span, moments, spans


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
        got = maps.mask(maps.grid(lens, x[red], t, heads)[:, 0], "half", 32)
        iou = (got & masks[red]).sum((1, 2)) / (got | masks[red]).sum((1, 2))
        assert iou.mean() > 0.9
    raw = maps.mask(maps.attention(lens, x[red]), "half", 32)  # it looks evenly, so attention says nothing
    assert ((raw & masks[red]).sum((1, 2)) / (raw | masks[red]).sum((1, 2))).mean() < 0.5


def test_heads_of_a_property_come_named_first_then_by_score():
    score = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [2.0, 5.0]]])
    named = [labels.Named(7, h, x, "", 0.0, 0.0) for h, x in enumerate(("a", "none", "b"))]
    zero, none = torch.zeros(1, 3, 2), torch.zeros(0, 2)
    seen = HeadMoments(2, zero, zero, (7,))
    f = Findings((), ("a", "b"), none.bool(), none, seen, [], named, score, torch.ones(1, 3, 2), [], {})
    assert f.heads("a") == [(7, 0), (7, 1), (7, 2)]
    assert f.heads("b") == [(7, 2), (7, 0), (7, 1)]
    also = replace(f, p=torch.tensor([[[1.0, 1.0], [1.0, 0.01], [1.0, 0.0]]]))
    assert also.heads("b") == [(7, 2), (7, 1), (7, 0)]
    with pytest.raises(ConfigError, match="no property 'c'"):
        f.heads("c")


def test_pool_and_taxonomy_belong_together(tiny_clip, tmp_path):
    with pytest.raises(ConfigError, match="belong together"):
        find(tiny_clip, replace(TINY, pool=str(tmp_path / "p.txt")))
    (tmp_path / "p.txt").write_text("\n".join(WORDS))
    (tmp_path / "t.json").write_text(json.dumps({k: list(v) for k, v in TAXONOMY.items()} | {"nothing": ["zzz"]}))
    f = find(tiny_clip, replace(TINY, pool=str(tmp_path / "p.txt"), taxonomy=str(tmp_path / "t.json")))
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

    monkeypatch.setattr(finding, "Model", Judge)
    pool = ["cat", "dog", "owl", "red", "blue", "green"]
    fits = torch.tensor([[1, 0]] * 3 + [[0, 1]] * 3).bool()
    spans_ = [Span(0, h, (i, 3), (0.5, 0.2), 0.1, 2, 1.0) for h, i in enumerate((0, 4))]
    named = asked_model(TINY, spans_, pool, ["Animals", "colour"], fits)
    assert [n.label for n in named] == ["Animals", "whatever"]
    assert [(set(texts), name) for texts, name in seen[0]] == [
        ({"cat", "dog", "owl"}, "Animals"), ({"red", "blue", "green"}, "colour")]  # fmt: skip
    own = ((("cat", "dog"), "pets"),)
    asked_model(replace(TINY, examples=own), spans_, pool, ["Animals", "colour"], fits)
    assert seen[1] == list(own)
