"""What patches of CLIP are measured by: metrics, classifiers, probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from patches.families import clip
from registry.errors import ConfigError
from tests.training.clip_sae.some import TINY
from training.lab import worlds
from training.tasks import recognition as tasks
from training.tasks.recognition import Answers, ask, classifier, metrics, pictures, world, worth


def test_typographic_metrics_are_their_definitions():
    logits = torch.tensor([[5.0, 1, 0], [5, 1, 0], [0, 5, 1], [0, 1, 5]])
    label, word = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 2, 1])
    said = {
        "clean": Answers(logits, label, torch.full((4,), -1)),
        "attacked": Answers(logits, label, word),
        "blank": Answers(logits, torch.tensor([0, 0, 1, 1]), torch.full((4,), -1)),
    }
    assert metrics(TINY, said) == {"clean": 0.5, "attacked": 0.5, "says_word": 0.25, "two_way": 0.5, "blank": 0.75}


def test_group_metrics_are_their_definitions():
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])
    label, place = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 1])
    got = metrics(replace(TINY, task="celeba"), {"clean": Answers(logits, label, place)})
    assert got == {"average": 0.8, "worst_group": 0.5, "group_0": 1.0, "group_1": 0.5, "group_2": 1.0, "group_3": 1.0}


def test_what_costs_too_much_is_never_preferred():
    base = {"clean": 0.9, "attacked": 0.1}
    kept, costly, worse = ({"clean": c, "attacked": a} for c, a in ((0.89, 0.2), (0.88, 0.9), (0.5, 0.95)))
    order = [worth(TINY, got, base) for got in (kept, costly, worse)]
    assert order == sorted(order, reverse=True)
    assert order[0] == 0.2
    assert order[1] < 0


def test_classes_of_birds_and_portraits_are_the_names_they_are_drawn_as():
    base = clip.tiny()
    for task in ("waterbirds", "celeba"):
        config = replace(TINY, task=task)
        data = pictures(config, "val", 8)["clean"]
        by = classifier(base, config, data)
        assert by.classes == data.classes
        assert len(by.weights) == 24
        torch.testing.assert_close(by.weights.norm(dim=0), torch.ones(len(by.labels)))


def test_a_probe_takes_what_train_couples_for_the_class(tiny_clip):
    """Planted: pictures of train that tell the label and the place apart alike, coupled by .95; the probe follows both,
    and where they disagree it is wrong more often than where they agree."""
    config = replace(TINY, task="waterbirds", classifier="probe", ranks=("gates",))
    by = tasks.probe(tiny_clip, config)
    assert by is tasks.probe(tiny_clip, config)
    assert by.weights.shape == (24, len(worlds.LANDBIRDS) + len(worlds.WATERBIRDS))
    train = world(config, "waterbirds", "train", 400)
    said = ask(tiny_clip, config, train, by)
    right = said.logits.argmax(1) == said.label
    agree = said.label == said.other
    assert float(right.float().mean()) > 0.9
    assert float(right[agree].float().mean()) > float(right[~agree].float().mean()) + 0.3
    with pytest.raises(ConfigError, match="typographic is zero-shot"):
        tasks.probe(tiny_clip, replace(config, task="typographic"))
