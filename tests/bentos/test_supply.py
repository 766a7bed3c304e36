"""What is written beside a Bento for those who answer for it; no Bento is built here (test_build.py does)."""

import json
from importlib import metadata

import pytest

from bentos.build import supply
from registry.errors import ConfigError

PINNED = [f"{n}=={metadata.version(n).partition('+')[0]}" for n in ("starlette", "torch", "numpy", "mlflow")]


@pytest.fixture(name="beside")
def _beside(tmp_path):
    facts = {"tag": "clip_sae:abc-def", "artifact": "a" * 64, "base": f"lab:clip@{'b' * 64}", "requirements": PINNED}
    (tmp_path / "contents.json").write_text(json.dumps(facts))
    return tmp_path


def test_the_bill_of_materials_is_cyclonedx_and_lists_everything(beside):
    pytest.importorskip("cyclonedx")
    bom, licences = supply.write(beside)
    said = json.loads(bom.read_text())
    assert (said["bomFormat"], said["specVersion"]) == ("CycloneDX", "1.6")
    named = {c["name"]: c for c in said["components"]}
    assert {"starlette", "torch", "numpy", "mlflow"} <= named.keys()
    assert named["torch"]["purl"].startswith("pkg:pypi/torch@2.14.1")
    models = [c for c in said["components"] if c["type"] == "machine-learning-model"]
    assert {h["content"] for c in models for h in c["hashes"]} == {"a" * 64, "b" * 64}
    listed = json.loads(licences.read_text())
    assert sorted(x.partition("==")[0] for v in listed.values() for x in v) == ["mlflow", "numpy", "starlette", "torch"]
    assert supply.UNKNOWN not in listed


def test_without_the_library_the_extra_is_named(beside, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(supply.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"patchbay\[sbom\]"):
        supply.write(beside)


def test_a_base_image_is_taken_by_digest_alone(monkeypatch):
    assert supply.base_image("python:3.11-slim") == "python:3.11-slim"
    monkeypatch.setenv("PATCHBAY_IMAGE", f"registry.example/python@sha256:{'c' * 64}")
    assert supply.base_image("x").endswith("c" * 64)
    monkeypatch.setenv("PATCHBAY_IMAGE", "python:latest")
    with pytest.raises(ConfigError, match="digest"):
        supply.base_image("x")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (f"FROM python@sha256:{'c' * 64}\nUSER bentoml\n", []),
        ("FROM python:3.11-slim as base-container\nUSER bentoml\n", ["tag"]),
        (f"FROM python@sha256:{'c' * 64}\nUSER bentoml\nUSER root\n", ["root"]),
        ("FROM python:3.11-slim\n", ["root", "tag"]),
    ],
)
def test_what_a_dockerfile_does_not_keep_is_said(text, wrong):
    said = supply.check(text)
    assert len(said) == len(wrong)
    assert all(word in why for word, why in zip(wrong, said, strict=True))
