"""What a fit seals, and what its report says."""

from __future__ import annotations

import json

from patches.evidence import read_evidence
from registry import manifest
from tests.training.clip_heads.some import TINY
from training import run
from training.clip_heads import report
from training.lab.probes import PROBES


def test_what_was_found_and_who_changed_it_is_sealed(tmp_path):
    changes = tmp_path / "changes.json"
    changes.write_text(
        json.dumps([{"layer": 1, "head": 2, "label": "text", "who": "ann", "why": "looked", "at": "2026-01-01"}])
    )
    folder = run.fit("clip_heads/tiny", [f"changes={changes}", "draws=1"])
    about = manifest.read(folder)
    assert {"heads.json", "evidence.json", "means.safetensors", "gallery/gallery.safetensors"} <= about.files.keys()
    found = json.loads((folder / "heads.json").read_text())
    assert len(found["heads"]) == 12
    (row,) = [h for h in found["heads"] if (h["layer"], h["head"]) == (1, 2)]
    assert (row["label"], row["source"]) == ("text", "human")
    assert found["trail"][0]["who"] == "ann"
    assert found["metrics"]["kappa"]["spectrum"] <= 1.0
    fitted = read_evidence(folder)
    assert fitted["chosen"]["worth"] == max(r["worth"] for r in fitted["candidates"])
    assert len(fitted["random"][0]["heads"]) == fitted["chosen"]["count"]
    got = report(folder, TINY)
    assert set(got["arms"]) == {"base", "clip_heads", "random 0"}
    assert got["arms"]["base"]["test"]["clean"].n == TINY.test_images
    assert set(PROBES) <= got["properties"].keys()
