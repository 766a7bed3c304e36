"""Model cards: Hugging Face reads their front matter, and they say what was measured and nothing else."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from registry import card, manifest
from registry.measure import Measure
from registry.systems import SYSTEMS

SEALED = sorted((Path(manifest.__file__).parents[1] / "patches" / "lab" / "sealed").iterdir())


@pytest.mark.parametrize("folder", SEALED, ids=lambda f: f.name)
def test_every_shipped_artifact_has_a_card_that_hugging_face_reads(folder):
    about = manifest.read(folder)
    text = card.card(folder, about)
    read = ModelCard(text)
    assert read.data.library_name == "patchbay"
    assert read.data.license == "apache-2.0"
    assert about.digest in read.text
    assert SYSTEMS[about.system].paper in read.text
    assert "Nothing was measured yet" in read.text
    assert all(label in read.text for label in about.bases.values())


def test_a_card_says_both_sides_the_gate_and_who_signed():
    folder = SEALED[-1]
    about = manifest.read(folder)
    sides = {"base": {"accuracy": Measure(0.25, 0.2, 0.3, 40)}, "patched": {"accuracy": Measure(0.75, 0.7, 0.8, 40)}}
    promise = {"kept": False, "says": "accuracy at least 0.8: 0.75"}
    gate = {"status": "failed", "recipe": "x/lab", "dataset": ["pictures", "f" * 64], "promises": [promise]}
    text = card.card(folder, about, sides, gate, ["abc.sig"])
    read = ModelCard(text)
    assert "| accuracy | 0.25 [0.2, 0.3] | 0.75 [0.7, 0.8] | 40 |" in text
    assert "BROKEN: accuracy at least 0.8" in text
    assert "abc.sig" in text
    (result,) = read.data.eval_results
    assert (result.metric_value, result.dataset_name) == (0.75, "pictures")
    index = yaml.safe_load(text.split("---")[1])["model-index"]
    assert index[0]["results"][0]["metrics"][0]["value"] == 0.75


def test_a_base_of_the_hub_is_named_and_its_licence_is_not_guessed(tmp_path):
    about = manifest.write(
        tmp_path, kind="patch", system="clip_heads", base=f"hf-hub:org/model@abc@{'a' * 64}", config={}
    )
    read = ModelCard(card.card(tmp_path, about))
    assert read.data.base_model == ["org/model"]
    assert read.data.license == "other"
