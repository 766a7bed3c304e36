"""The full report."""

from __future__ import annotations

import json
import sys
from functools import partial

from tests.training.clip_sae.some import TINY
from training import run
from training.clip_sae import report
from training.clip_sae.defences import DEFENCES
from training.evidence import plain

reporting = sys.modules["training.clip_sae.report"]


def test_the_table_holds_every_defence_with_its_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "DEFENCE_PAIRS", 24)
    short = {
        "dyslexify": {"skips": 1},
        "prefix": {"steps": 2},
        "projection": {"ranks": (0.5,), "stays": (1.0,), "steps": 2},
        "interpolation": {"steps": 2, "shares": (0.5,)},
    }
    monkeypatch.setattr(reporting, "DEFENCES", {k: partial(fitter, **short[k]) for k, fitter in DEFENCES.items()})
    folder = run.fit("clip_sae/tiny")
    got = report(folder, TINY)
    assert json.loads(got.file.read_text()) == plain(got)
    assert {"base", "clip_sae", "random features", "mean direction", *DEFENCES} == got["arms"].keys()
    for arm in got["arms"].values():
        for split in ("test", "held"):
            for m in arm[split].values():
                assert 0 <= m.low <= m.value <= m.high <= 1
                assert m.n == TINY.test_images
    measured = run.evaluate(folder)
    assert got["arms"]["base"]["test"]["attacked"] == measured.sides["base"]["target/attacked"]
    assert got["arms"]["clip_sae"]["held"]["clean"] == measured.sides["patched"]["quality/clean_held"]
