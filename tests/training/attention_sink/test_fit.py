"""What is fitted, what is refused, what is sealed."""

from __future__ import annotations

import sys

import pytest

from patches import artifact
from patches.evidence import read_evidence
from patches.families import llm
from registry.errors import PatchError
from tests.training.attention_sink.some import TINY
from training import attention_sink as job
from training.attention_sink.find import find
from training.attention_sink.measure import fit_words

fitting = sys.modules["training.attention_sink.fit"]


def test_a_sink_that_belongs_to_bos_is_told_apart_and_not_patched(tmp_path, monkeypatch):
    base = llm.planted(by_bos=True)
    assert find(base, fit_words(base, TINY)[:4], 100).bound_to == "bos"
    monkeypatch.setattr(fitting, "load_base", lambda *_: base)
    with pytest.raises(PatchError, match="bound to its BOS token"):
        job.fit(TINY, tmp_path)


def test_a_model_without_a_sink_is_refused(tmp_path, monkeypatch):
    base = llm.tiny(seed=1)
    monkeypatch.setattr(fitting, "load_base", lambda *_: base)
    with pytest.raises(PatchError, match="no attention sink"):
        job.fit(TINY, tmp_path)


def test_everything_that_was_tried_is_sealed_with_the_patch(fitted):
    folder, about = fitted
    report = read_evidence(folder)
    assert report["chosen"] in report["candidates"]
    assert {"base", "paper"} <= report["candidates"].keys()
    assert "evidence.json" in about.files
    assert artifact.load(folder)[0].digest == about.digest
