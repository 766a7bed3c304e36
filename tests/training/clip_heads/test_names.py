"""Names of heads: every judge on a planted truth, metrics at their extremes, nulls, a person's word."""

import json

import httpx
import pytest
import torch

from registry.errors import ConfigError, Invalid, NotFound, NotReady
from training.clip_heads.names import (
    NONE,
    Change,
    Endpoint,
    Model,
    Named,
    by_embedding,
    by_keyword,
    by_spectrum,
    consistency,
    kappa,
    label,
    normalised,
    override,
    published,
    published_metrics,
    read_changes,
    read_taxonomy,
    sharing,
)
from training.lab import pool
from training.tasks.textspan import HeadMoments, Span

TAXONOMY = {"colour": ("red", "blue"), "animal": ("cat", "dog"), "place": ("beach",)}
TEXTS = ("a red hat", "a blue cat", "a dog", "the beach", "reddish", "nothing")


def span(layer, head, texts):
    n = len(texts)
    return Span(layer, head, tuple(texts), (1 / max(n, 1),) * n, n, 1.0, 0.1)


def test_keywords_are_whole_words():
    got = by_keyword(TEXTS, TAXONOMY)
    assert got.tolist() == [
        [True, False, False], [True, True, False], [False, True, False], [False, False, True],
        [False] * 3, [False] * 3,
    ]  # fmt: skip


def test_embeddings_find_the_near_property():
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(3, 16, generator=g) * 3
    names = [f"{p}{i}" for p in range(3) for i in range(12)]

    def embed(texts):
        noise = torch.randn(len(texts), 16, generator=torch.Generator().manual_seed(len(texts)))
        return torch.nn.functional.normalize(torch.stack([centre[int(t[0])] for t in texts]) + 0.3 * noise, dim=1)

    got = by_embedding(names, {"a": ["0x"], "b": ["1x"], "c": ["2x"]}, embed, level=0.6)
    assert got.any(1).float().mean() > 0.9
    assert (got.float().argmax(1) == torch.arange(3).repeat_interleave(12))[got.any(1)].all()


def test_a_head_is_called_what_its_texts_are_about_more_than_the_pool():
    fits = torch.zeros(40, 2, dtype=torch.bool)
    fits[:4, 0] = True  # rare
    fits[10:, 1] = True  # common
    named = label([span(0, 0, [0, 1, 2, 20]), span(0, 1, [20, 21, 5, 30]), span(0, 2, [])], fits, ("a", "b"), "keyword")
    assert [n.label for n in named] == ["a", NONE, NONE]
    assert named[0].p < 0.01


def test_the_spectrum_finds_the_head_that_tells_a_property_s_texts_apart():
    g = torch.Generator().manual_seed(1)
    k, each = 30, 20
    R = torch.zeros(3 * each, k)
    for p in range(3):  # the texts of a property differ in ten dimensions of their own
        R[p * each : (p + 1) * each, 10 * p : 10 * p + 10] = torch.randn(each, 10, generator=g)
    fits = torch.eye(3, dtype=torch.bool).repeat_interleave(each, 0)
    covariance = torch.stack([torch.eye(k) * 0.1 for _ in range(8)]).double()
    for h in range(3):
        for i in range(10 * h, 10 * h + 10):
            covariance[h, i, i] = 1.0
    seen = HeadMoments(1, torch.zeros(1, 8, k).double(), covariance[None], (5,))
    named, score, p = by_spectrum(seen, R, fits, ("a", "b", "c"), draws=40)
    assert [n.label for n in named] == ["a", "b", "c", *[NONE] * 5]
    assert [int(score[0, h].argmax()) for h in range(3)] == [0, 1, 2]
    assert p[0, :3].diagonal().max() < 0.01
    with pytest.raises(Invalid, match="two texts"):
        by_spectrum(seen, R, fits & (torch.arange(60) > 58)[:, None], ("a", "b", "c"))


def served(answers):
    """A chat endpoint that answers from a list and remembers what it was asked."""
    seen = []

    def handle(request):
        seen.append((json.loads(request.content), request.headers))
        return httpx.Response(200, json={"choices": [{"message": {"content": answers[len(seen) - 1]}}]})

    return httpx.MockTransport(handle), seen


def test_a_language_model_names_with_examples_and_judges_by_numbers(monkeypatch):
    transport, seen = served(["Colours.\nbecause", "1, 3 and 9"])
    monkeypatch.setenv("MY_KEY", "hush")
    model = Model(Endpoint("http://here/v1", "m", "MY_KEY"), [(["a cat", "a dog"], "animals")], transport)
    assert model.name(["red", "blue"]) == "colour"
    roles = [m["role"] for m in seen[0][0]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert seen[0][1]["authorization"] == "Bearer hush"
    assert model.fits(["red", "dog", "blue"], ["colour"])[:, 0].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("reply", "says"),
    [(lambda r: httpx.Response(500), "did not answer"), (lambda r: httpx.Response(200, json={}), "did not answer")],
)
def test_an_endpoint_that_fails_is_named(reply, says):
    with pytest.raises(NotReady, match=says):
        Model(Endpoint("http://here/v1"), transport=httpx.MockTransport(reply)).name(["a"])
    with pytest.raises(ConfigError, match="http"):
        Model(Endpoint("file:///etc/passwd")).name(["a"])
    with pytest.raises(ConfigError, match="NOT_SET"):
        Model(Endpoint("http://here", key="NOT_SET")).name(["a"])


def test_a_sentence_is_no_name():
    transport, _ = served(["The texts have a few common properties that"])
    assert Model(Endpoint("http://here/v1"), transport=transport).name(["a"]) == NONE


def test_a_model_that_says_nothing_is_told():
    transport, _ = served(["  ...\n"])
    with pytest.raises(NotReady, match="named no property"):
        Model(Endpoint("http://here/v1"), transport=transport).name(["a"])


def test_a_person_overrules_and_leaves_a_trail(tmp_path):
    named = [Named(0, 0, "colour", "keyword", 3.0, 0.01), Named(0, 1, NONE, "keyword", 0.0, 1.0)]
    changes = [Change(0, 1, "text", "ann", "saw it", "2026-01-01"), Change(0, 1, "place", "bob", "no", "2026-01-02")]
    now, trail = override(named, changes)
    assert [n.label for n in now] == ["colour", "place"]
    assert now[1].source == "human"
    assert [(t["was"], t["by"]) for t in trail] == [(NONE, "keyword"), ("text", "human")]
    assert named[1].label == NONE
    with pytest.raises(NotFound, match=r"\(9, 9\)"):
        override(named, [Change(9, 9, "a", "b", "c", "d")])
    with pytest.raises(Invalid, match="who and why"):
        override(named, [Change(0, 0, "a", " ", "c", "d")])
    file = tmp_path / "changes.json"
    file.write_text(json.dumps([vars(c) for c in changes]))
    assert read_changes(file) == changes


def test_sharing_at_its_extremes():
    same, own = sharing(["a"] * 6), sharing(list("abcdef"))
    assert (same["unique"][0], same["shared"][0], same["largest"]) == (0.0, 1.0, ["a", 1.0])
    assert (own["unique"][0], own["shared"][0]) == (1.0, 0.0)
    assert sharing(["Colors", "color.", "place"])["unique"][0] == pytest.approx(1 / 3, abs=1e-3)


def test_consistency_is_full_for_true_labels_and_chance_for_shuffled_ones():
    P = 4
    fits = torch.eye(P, dtype=torch.bool).repeat_interleave(5, 0)
    rows = [span(0, h, range(5 * (h % P), 5 * (h % P) + 5)) for h in range(16)]
    names = tuple("abcd")
    good = [Named(0, h, names[h % P], "x", 1.0, 0.0) for h in range(16)]
    got = consistency(good, rows, fits, names)
    assert got["association"][0] == got["texts"][0] == 1.0
    assert got["association_p"] < 0.01
    assert got["association_null"][0] == pytest.approx(0.25, abs=0.05)
    assert got["ccs_at"]["5"] == 1.0
    assert got["ccr"] == 0.25
    bad = [Named(0, h, names[(h + 1) % P], "x", 1.0, 0.0) for h in range(16)]
    got = consistency(bad, rows, fits, names)
    assert got["association"][0] == 0.0
    assert got["association_p"] > 0.9
    assert consistency([Named(0, 0, NONE, "x", 0.0, 1.0)], rows, fits, names) == {"heads": 0}


def test_kappa_is_one_for_agreement_and_zero_for_chance():
    assert kappa(list("aabb"), list("aabb")) == 1.0
    assert kappa(list("aabb"), list("abab")) == 0.0


def test_published_labels_are_read_without_running_them(tmp_path):
    file = tmp_path / "topic_seg_labels.py"
    file.write_text(
        "raise SystemExit\n"
        "def get_ViT_B_16_openai_layer9_head_anno():\n"
        '    layer_head_anno = ["L9.H0 (Colors)",\n "L9.H1 (Art)"\n "Aggregate"]\n'
        "def get_ViT_B_16_openai_layer10_head_anno():\n"
        '    layer_head_anno = ["L10.H0 (Color)",\n "L10.H1 (Animals)", "Aggregate"]\n'
    )
    got = published(file)
    assert got == {"ViT_B_16_openai": {(9, 0): "Colors", (9, 1): "Art", (10, 0): "Color", (10, 1): "Animals"}}
    assert published_metrics(file)["ViT_B_16_openai"]["unique"][0] == 0.5
    file.write_text("nothing")
    with pytest.raises(Invalid, match="no labels"):
        published(file)


def test_taxonomies_are_checked(tmp_path):
    file = tmp_path / "t.json"
    file.write_text('{"colour": ["red"], "place": ["beach", "city"]}')
    assert read_taxonomy(file) == {"colour": ("red",), "place": ("beach", "city")}
    for bad in ("[1]", '{"a": ["b"]}', '{"a": ["b"], "c": []}', '{"a": "b", "c": ["d"]}', "{"):
        file.write_text(bad)
        with pytest.raises(Invalid, match=r"t\.json"):
            read_taxonomy(file)


def test_the_lab_s_pool_is_large_and_each_sentence_has_one_property():
    assert len(pool.texts()) >= 1000
    assert len(set(pool.texts())) == len(pool.texts())
    fits = pool.fits()
    assert (fits.sum(1) == 1).all()
    assert fits.sum(0).min() >= 20


def test_labels_are_compared_by_their_words():
    assert [normalised(x) for x in ("Colors", "Geo-location", "Photography.", "class")] == [
        "color", "geo location", "photography", "class",
    ]  # fmt: skip
