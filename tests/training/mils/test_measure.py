"""Measures of searches: the judge knows what is there, drawings are judged as drawings, reports have their controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.evidence import read_evidence
from patches.families.search.config import SearchConfig
from registry import config as configs
from registry import manifest
from training.lab import atlas, judge, worlds
from training.lab.renderer import Layout, choose, generator, grounds, render, things
from training.mils import RECIPES, fit, measure, report
from training.mils import judge as judges
from training.mils.items import Task
from training.mils.scenes import scenes


def test_the_judge_prefers_what_is_there():
    data = scenes("val", 12)
    texts = [r[0] for r in data.references]
    seen = judges.seen(data.images)
    own, other = judges.score(seen, texts), judges.score(seen, texts[1:] + texts[:1])
    assert seen.shape == (12, len(atlas.load().names))
    assert sum(a > b for a, b in zip(own, other, strict=True)) >= 10
    assert judges.score(seen[:1], ["a picture of nothing at all"]) == [0.0]


def test_the_judge_calls_a_drawing_by_its_name():
    lab, g = atlas.load(), generator("tests", 0)
    names = list(worlds.imagenet_classes()[:6])
    sprite = torch.stack([choose(lab.pick([lab.find(n)], worlds.STYLES["train"][:1]), (1,), g) for n in names])
    layout = Layout(grounds(6, g, textures=(0, 1)), things(sprite, g, size=(0.9, 0.95)))
    drawn = render(layout, size=judges.INPUT).image
    right = judges.right(drawn, names)
    assert sum(right) >= 3
    assert not any(judges.right(drawn, names[1:] + names[:1]))
    assert judge.load() is judge.load()


def test_a_text_is_worth_what_it_says():
    task = Task([{}] * 3, [("cat", "dog")] * 3, ("cat", "dog", "owl"))
    done = measure.Run(task, [], 0.0)
    texts = ["a cat and a dog", "a cat", "an owl"]
    assert measure.worth(done, texts) == pytest.approx([1.0, 2 / 3, 0.0])
    got = measure.metrics(done, texts)
    assert got["target/recall"].value == pytest.approx(0.5)
    assert "quality/judge" not in got


@pytest.mark.parametrize("kind", ["prompt", "style", "both"])
def test_tasks_that_make_or_hear_are_fitted_and_reported(kind, tmp_path):
    """On random bases: a sealed search, what it was chosen by, the bank and random lines beside it."""
    whole = RECIPES[kind]
    config = replace(
        RECIPES["tiny"], data=whole.data, renderer="tiny:0" if kind == "prompt" else "", items=2, fit_items=1,
        sound_steps=1, pace=False,
        search=SearchConfig(keep=3, ask=1, steps=1, lines=2, drawn=1),
    )  # fmt: skip
    fit(config, tmp_path)
    about = manifest.read(tmp_path)
    search = configs.parse(SearchConfig, about.config)
    assert search.task == whole.search.task
    assert bool(search.renderer) == (kind in ("prompt", "style"))
    assert bool(search.sound) == (kind == "both")
    found = read_evidence(tmp_path)
    assert found["val_score_by_round"] == sorted(found["val_score_by_round"])
    made = report(tmp_path, config)
    assert set(made["test"]) == {"bank", "patch", "random"}
    assert set(made["minus_bank"]) == {"patch", "random"}
    goal = "target/drawn_right" if kind == "prompt" else "target/f1"
    for row in made["test"].values():
        assert row[goal].n == 2
        assert row["offtarget/calls"].value <= 4
