"""Recipes on real clips: what a user's `data=` reaches, the damaged twins, and several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from patches.families.base import load_base
from patches.families.video.base import read
from patches.subject import Subject
from registry.errors import ConfigError, NotFound
from tests.patches.families.video.test_decode import film
from tests.training.data.test_video import put, ucf
from training.videomae import RECIPES, evaluate, fit, report
from training.videomae.fit import made

KNOWN = ("still", "left", "right")
"""classes of the family's tiny checkpoint"""
TINY = replace(RECIPES["tiny"], base="tiny", stage="natural", steps=2, labels=6, tune_steps=2, probe_steps=2,
               test_clips=3, val_clips=3, stride=1)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    pytest.importorskip("av")
    return ucf(tmp_path_factory.mktemp("ucf"), film(8, 32, container="avi"), KNOWN)


def test_a_checkpoint_of_real_clips_is_fitted_measured_and_reported(data: Path, tmp_path: Path, home) -> None:
    put(tmp_path / "P" / "shot" / "3" / "left" / "v.avi", film(8, 32, container="avi"))
    config = replace(TINY, data=f"ucf101:{data}", damaged=str(tmp_path / "P"))
    fit(config, tmp_path / "out")
    model = read(tmp_path / "out")
    assert model.classes == KNOWN
    assert model.classifier.config.num_labels == 3
    got = evaluate(Subject(load_base("tiny", "video")), config, None)
    assert got["target/accuracy"].n == 3
    found = report(tmp_path / "out", config)
    assert set(found["corrupted"]) == {"clean", "shot"}
    assert found["accuracy"]["checkpoint"].n == 3


def test_bases_must_know_the_same_classes_or_none(data: Path, tmp_path: Path, home) -> None:
    with pytest.raises(ConfigError, match="knows 11 classes .* the clips have 3"):
        fit(replace(TINY, data=str(data), base="tiny:motions"), tmp_path / "a")
    with pytest.raises(ConfigError, match="there is no reader 'films'"):
        fit(replace(TINY, data=f"films:{data}"), tmp_path / "b")
    with pytest.raises(NotFound, match="There is no"):
        fit(replace(TINY, data="hmdb51:/nowhere"), tmp_path / "c")


def test_a_base_without_a_head_is_probed(data: Path) -> None:
    base = load_base("tiny", "video")
    base.model.probe = None
    got = evaluate(Subject(base), replace(TINY, data=str(data)), None)
    assert got["target/accuracy"] == got["target/probe"]


@pytest.mark.slow
def test_processes_that_train_together_make_the_same_checkpoint(tmp_path: Path, home) -> None:
    config = replace(RECIPES["tiny"], steps=4, labels=11, tune_steps=2, probe_steps=2)
    one, two = (made(replace(config, processes=n), tmp_path / str(n)) for n in (1, 2))
    for (name, a), b in zip(one.net.state_dict().items(), two.net.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-2, msg=name)
