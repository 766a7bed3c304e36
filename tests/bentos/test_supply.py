"""What is written beside a Bento for those who answer for it; no Bento is built here (test_build.py does)."""

import json
import subprocess
import types
from importlib import metadata
from pathlib import Path

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
    needs = {d["ref"]: set(d.get("dependsOn", ())) for d in said["dependencies"]}
    assert needs["clip_sae:abc-def"] == {c["bom-ref"] for c in said["components"]}  # the Bento has all of it
    (mlflow,) = (refs for ref, refs in needs.items() if ref.startswith("pkg:pypi/mlflow@"))
    assert any(ref.startswith("pkg:pypi/numpy@") for ref in mlflow)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ("License-Expression: MIT\nLicense: see LICENSE\nClassifier: License :: OSI Approved :: BSD License", "MIT"),
        ("License: Copyright (c) 2001 X, Inc.\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("License: 3-Clause BSD\nClassifier: License :: OSI Approved", "3-Clause BSD"),
        ("Classifier: License :: OSI Approved :: A\nClassifier: License :: OSI Approved :: B", "A, B"),
        ("License:\nSummary: x", supply.UNKNOWN),
    ],
)
def test_a_licence_is_what_the_distribution_says_most_exactly(tmp_path, headers, said):
    folder = tmp_path / "x-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: x\nVersion: 1\n{headers}\n")
    assert supply.licence(metadata.PathDistribution(folder)) == said


def index(monkeypatch, *found):
    """pip says (name, version, sha256) of each of these."""

    def run(command, **_):
        said = [{"metadata": {"name": n, "version": v}, "download_info": {"archive_info": {"hashes": h}}}
                for n, v, h in found]  # fmt: skip
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": said}))
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(supply.subprocess, "run", run)


def test_hashes_stand_where_the_image_installs_from_and_nothing_else_is_left(beside, monkeypatch):
    index(monkeypatch, ("Torch", "2.14.1", {"sha256": "d" * 64}), ("numpy", "2.1", {"sha256": "e" * 64}))
    installs = beside / "requirements.txt"
    *_, hashed = supply.write(beside, True, installs)
    assert (
        installs.read_text()
        == hashed.read_text()
        == (f"numpy==2.1 --hash=sha256:{'e' * 64}\ntorch==2.14.1 --hash=sha256:{'d' * 64}\n")
    )
    assert supply.plain(installs.read_text().split("\n")) == ["numpy==2.1", "torch==2.14.1"]
    assert not (beside / supply.REPORT).exists()


def test_without_every_hash_there_is_no_list_of_hashes(beside, monkeypatch):
    index(monkeypatch, ("numpy", "2.1", {"sha256": "e" * 64}), ("torch", "2.14.1", {}))
    with pytest.raises(ConfigError, match=r"no sha256 of torch==2\.14\.1"):
        supply.write(beside, True)

    def never(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(supply.subprocess, "run", never)
    with pytest.raises(ConfigError, match="within 900 s"):
        supply.hashed(PINNED, beside)
    assert not (beside / "requirements.hashed.txt").exists()


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
