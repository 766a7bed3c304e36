"""Fitting: dictionaries, candidates, the choice, what is sealed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest
import torch

from patches import artifact
from patches.engine.patch import ONLY
from patches.evidence import read_evidence
from patches.evidence.label_set import LabelSet, load_label_set, save_label_set
from patches.families import clip
from patches.sae_files import load_sae, save_sae
from patches.subject import Subject
from registry import manifest
from registry.errors import ConfigError, Tampered, WrongBase
from tests.training.clip_sae.some import TINY, F, some_sae
from training.clip_sae import RECIPES, evaluate, fit
from training.clip_sae.find import steering
from training.clip_sae.fit import candidates, dictionary_of
from training.clip_sae.fit import view as real_view
from training.clip_sae.streams import streams
from training.lab import worlds
from training.tasks import recognition as tasks
from training.tasks.recognition import KEPT, classifier, pictures, worth

fitting = sys.modules["training.clip_sae.fit"]
"""the package's own `fit` is the function"""


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


def test_what_is_left_of_a_feature_is_a_multiple_of_its_mean_over_groups(tiny_clip):
    config = replace(TINY, task="waterbirds", ranks=("difference",), counts=(3,), levels=(0.0, 0.5), layers=(1,))
    seen = {k: streams(tiny_clip, config, d)[1] for k, d in pictures(config, "train", 24).items()}
    rare = torch.tensor([0, 1, 2, *range(3, 24)])[seen["clean"].other.argsort()][:15]  # groups of unlike sizes
    seen = {"clean": seen["clean"].rows(rare)}
    sae, by = some_sae(), classifier(tiny_clip, config, pictures(config, "val", 2)["clean"])
    rows = list(candidates(tiny_clip, config, 1, sae, seen, by))
    assert [(r["level"], p.config.op) for r, p in rows] == [(0.0, "zero"), (0.5, "clamp")]
    js = list(rows[1][1].config.features)
    s = seen["clean"]
    group = 2 * s.label + s.other
    each = [sae.encode(s.x[group == g]).mean((0, 1))[js] for g in range(4) if bool((group == g).any())]
    assert len({int((group == g).sum()) for g in range(4)}) > 1
    torch.testing.assert_close(rows[1][1].tensors["value"], 0.5 * torch.stack(each).mean(0))


def test_the_sealed_patch_is_the_best_candidate_on_val(fitted):
    report = read_evidence(fitted)
    base = report["layers"]["1"]["base"]
    best = max(report["candidates"], key=lambda row: (worth(TINY, row, base), row[KEPT[TINY.task]]))
    assert report["chosen"] == best
    _, patch = artifact.load(fitted)
    assert len(patch.config.features) == best["count"]
    assert patch.config.site == clip.site("block", best["layer"])
    assert {"attacked", "clean", "says_word"} <= report["random"].keys()
    assert len(report["random"]["features"]) == best["count"]
    sae = load_sae(fitted / "sae")
    assert torch.equal(sae.decoder[list(patch.config.features)], patch.tensors["decoder"])


def test_the_report_says_how_good_the_dictionary_is(fitted):
    layer = read_evidence(fitted)["layers"]["1"]
    for kind in ("all", "cls", "patches"):
        assert layer[kind]["explained_variance"] <= 1
        assert 0 <= layer[kind]["alive"] <= 1
        assert sum(layer[kind]["density"]) == pytest.approx(layer[kind]["alive"] * 96)
    assert len(layer["l0_map"]) == 17
    assert layer["ce"]["clean"] > 0
    assert layer["curve"][-1]["step"] == TINY.sae.steps


def test_a_published_dictionary_is_used_and_not_trained(tmp_path, monkeypatch):
    save_sae(replace(some_sae(), site="blocks.1.hook_resid_post"), tmp_path / "published-1")
    monkeypatch.setattr(fitting, "train", lambda *_, **__: pytest.fail("nothing is to be trained"))
    config = replace(TINY, dictionary=str(tmp_path / "published-{layer}"))
    fit(config, tmp_path / "out")
    assert len(load_sae(tmp_path / "out" / "sae").bias) == F


def test_steering_raises_the_word(tmp_path):
    """Features of the last block whose concept is the word, clamped high: the word's probability rises on test."""
    words = worlds.imagenet_classes()
    config = replace(TINY, task="steer", layers=(2,), op="clamp", value=40.0, word=words[0])
    with pytest.raises(ConfigError, match="is no class"):
        fit(replace(config, word="no such thing"), tmp_path / "none")
    base = clip.tiny()
    sae = some_sae()
    data = pictures(config, "train", 24)["clean"]
    seen = streams(base, config, data)[2]
    strong = torch.full((F,), 40.0)
    got = steering(base, 2, seen, sae.decoder, sae.encode, strong, classifier(base, config, data).weights.T)
    word = words[int(got.concept[got.power.argmax()])]
    save_sae(sae, tmp_path / "sae")
    config = replace(config, word=word, counts=(1,), dictionary=str(tmp_path / "sae"))
    fit(config, tmp_path / "steer")
    model = Subject.load(tmp_path / "steer", base)
    before, after = evaluate(model, config, None), evaluate(model, config, ONLY)
    model.close()
    assert after["target/probability"].value > 2 * before["target/probability"].value


def test_the_probe_is_sealed_with_the_patch_and_is_what_was_measured(tmp_path, tiny_clip):
    config = replace(TINY, task="waterbirds", classifier="probe", ranks=("gates",))
    fit(config, tmp_path)
    one = load_label_set(tmp_path)
    assert one.classes == ("landbird", "waterbird")
    torch.testing.assert_close(one.weights, tasks.probe(tiny_clip, config).weights)
    # what is measured is what is sealed, not what a fit here and now would give
    shutil.copytree(tmp_path, other := tmp_path.parent / "other")
    (other / manifest.NAME).unlink()  # a draft: of a sealed folder only what was hashed is read
    save_label_set(LabelSet(one.labels, -one.weights), other)
    data = pictures(config, "val", 2)["clean"]
    assert classifier(tiny_clip, config, data, folder=other).weights.equal(-one.weights)
    assert classifier(tiny_clip, config, data, folder=tmp_path).weights.equal(one.weights)
    model = Subject.load(tmp_path, tiny_clip)
    try:
        mine = evaluate(model, config, None)
        model.folder = other
        assert evaluate(model, config, None) != mine
    finally:
        model.close()


def test_a_candidate_counts_by_its_mean_over_val_and_the_folds(tmp_path, tiny_clip, monkeypatch):
    """Planted: val likes many features, every fold few; alone val decides, with two folds they do."""
    config = replace(
        TINY, task="waterbirds", classifier="probe", ranks=("difference",), counts=(2, 8), levels=(0.0, 1.0)
    )

    def judged(base, config, layer, seen, by, patch):
        few = patch is not None and len(patch.config.features) == 2
        return {"average": 1.0, "worst_group": 0.5 if patch is None else 0.6 + 0.2 * (few != (by is own[0]))}

    own = []

    def view(base, config, fold=""):
        one = real_view(base, config, fold)
        if not fold:
            own[:] = [one.by["val"]]
        return one

    monkeypatch.setattr(fitting, "view", view)
    monkeypatch.setattr(fitting, "measure", judged)
    for folds, want in (((), 8), (("noto", "fluent-emoji"), 2)):
        fit(replace(config, folds=folds), tmp_path / str(want))
        report = read_evidence(tmp_path / str(want))
        assert report["chosen"]["count"] == want
        assert set(report["chosen"].get("folds", {})) == set(folds)
    assert report["chosen"]["worth"] == pytest.approx((0.6 + 0.8 + 0.8) / 3)
    for odd in (replace(config, task="typographic"), replace(config, data="somewhere")):
        with pytest.raises(ConfigError, match="Folds are of the lab's groups"):
            pictures(odd, "val", 4, "noto")


def test_the_shipped_dictionary_is_checked_when_it_is_read(tmp_path, monkeypatch, tiny_clip):
    base, config = replace(tiny_clip, digest=manifest.read(clip.SHIPPED / "clip-sae").base_digest), RECIPES["demo"]
    sae, curve = dictionary_of(base, config, 4)
    assert (sae.site, curve) == (clip.site("block", 4), [])
    with pytest.raises(ConfigError, match=r"was trained at .*resblocks\.4, not at .*resblocks\.5"):
        dictionary_of(base, config, 5)
    with pytest.raises(WrongBase):
        dictionary_of(tiny_clip, config, 4)
    shutil.copytree(clip.SHIPPED / "clip-sae", tmp_path / "clip-sae")
    monkeypatch.setattr(clip, "SHIPPED", tmp_path)
    file = tmp_path / "clip-sae" / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Tampered):
        dictionary_of(base, config, 4)
