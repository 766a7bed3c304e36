"""An artifact sealed by the code before systems had rooms (schema 1, report.json) is measured, drawn and reported."""

from pathlib import Path

import pytest

from patches.evidence import read_evidence
from patches.subject import Subject
from registry import manifest
from training import run

OLD = Path(__file__).parent.parent / "data" / "before-the-house" / "attention_sink"
DIGEST = "fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296"
FEW = ("test_words=2", "copies=[4, 128]", "contexts=['prefix']", "fit_contexts=['prefix']")


def test_it_is_what_it_was():
    about = manifest.read(OLD, digest=DIGEST)
    assert list(about.bases) == ["base"]
    assert read_evidence(OLD)["circuit"]["bound_to"] == "position"
    model = Subject.load(OLD)
    assert list(model.arms) == ["patch"]
    model.close()


def test_it_is_measured_and_reported_as_ever():
    got = run.evaluate(OLD, FEW)
    assert got.sides["patched"]["quality/repeat_prefix_128"].value == 1.0
    assert got.sides["base"]["quality/repeat_prefix_128"].value < 1.0
    assert {"norms", "repeats", "candidates"} <= got.figures["patched"].keys()
    full = run.report(OLD, FEW)
    at = full.tables["variants"]["what"].index("sealed / prefix / 128")
    assert full.tables["variants"]["value"][at] == pytest.approx(1.0)
