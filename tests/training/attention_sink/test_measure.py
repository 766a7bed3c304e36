"""The base fails, the patch repairs, controls do not."""

from __future__ import annotations

import pytest
import torch

from patches.families import llm
from patches.mechanisms.sink import SinkConfig, SinkEdit
from patches.subject import Subject
from tests.training.attention_sink.some import TINY
from training import attention_sink as job
from training.attention_sink.measure import fit_words, measured_words, repeats
from training.data import text


def test_the_base_fails_at_many_copies_and_the_patch_mends_it(fitted):
    folder, _ = fitted
    model = Subject.load(folder, llm.planted())
    base, patched = ({k: m.value for k, m in job.evaluate(model, TINY, arm).items()} for arm in (None, "patch"))
    model.close()
    assert base.keys() == patched.keys()
    assert base["quality/repeat_prefix_4"] == patched["quality/repeat_prefix_4"] == 1.0
    assert base["quality/repeat_prefix_128"] < 1.0 == patched["quality/repeat_prefix_128"]
    assert base["quality/continue_100"] < 1.0 == patched["quality/continue_100"]
    for source in text.SOURCES:
        name = f"quality/perplexity_{source}"
        assert patched[name] == pytest.approx(base[name], rel=0.01)


def test_the_controls_do_not_mend_it(base):
    words = measured_words(base, TINY)
    rng = torch.Generator().manual_seed(0)
    arms = {
        "paper": SinkEdit(SinkConfig(neurons=((1, 7),)), {}),
        "random": SinkEdit(SinkConfig(neurons=((1, int(torch.randint(8, 48, (1,), generator=rng))),)), {}),
    }
    model = Subject(base, arms)
    right = {arm: sum(repeats(model, words, "bos", (128,), arm, True).right[128]) for arm in (None, *arms)}
    model.close()
    assert right["random"] == right[None] < right["paper"]


def test_words_for_fitting_and_testing_are_disjoint(base):
    assert not set(fit_words(base, TINY)) & set(measured_words(base, TINY))
