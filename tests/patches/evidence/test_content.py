"""What lies beside a patch is used from the bytes that were hashed, not from whatever lies there by then."""

import json

import pytest
import torch
from safetensors.torch import save_file

from patches.evidence import content, read_evidence, tensors, write_evidence
from patches.evidence.label_set import FILE, LabelSet, load_label_set, save_label_set
from registry import manifest
from registry.errors import Tampered


@pytest.fixture
def sealed(tmp_path):
    """A folder with evidence, a label set, and tensors in a folder within it."""
    (tmp_path / "gallery").mkdir()
    write_evidence(tmp_path, {"chosen": "a"})
    save_file({"x": torch.ones(3)}, tmp_path / "gallery" / "x.safetensors")
    save_label_set(LabelSet(("cat", "dog"), torch.eye(4)[:, :2].contiguous()), tmp_path)
    manifest.write(tmp_path, kind="patch", system="clip_sae", base="", config={})
    return tmp_path


def test_sealed_files_are_read_wherever_they_lie(sealed):
    assert read_evidence(sealed) == {"chosen": "a"}
    assert torch.equal(tensors(sealed / "gallery", "x.safetensors")["x"], torch.ones(3))
    assert load_label_set(sealed).labels == ("cat", "dog")


def test_a_file_swapped_after_the_check_is_not_used(sealed):
    digest = manifest.read(sealed).digest  # the check
    (sealed / "evidence.json").write_text(json.dumps({"chosen": "b"}))
    save_file({"x": torch.zeros(3)}, sealed / "gallery" / "x.safetensors")
    save_label_set(LabelSet(("cat", "fish"), torch.eye(4)[:, :2].contiguous()), sealed)
    for use in (
        lambda: read_evidence(sealed),
        lambda: tensors(sealed / "gallery", "x.safetensors"),
        lambda: load_label_set(sealed, digest),
    ):
        with pytest.raises(Tampered, match="not what was sealed"):
            use()


def test_a_manifest_swapped_with_its_files_is_another_artifact(sealed):
    digest = manifest.read(sealed).digest
    save_label_set(LabelSet(("cat", "fish"), torch.eye(4)[:, :2].contiguous()), sealed)
    (sealed / manifest.NAME).unlink()
    manifest.write(sealed, kind="patch", system="clip_sae", base="", config={})
    with pytest.raises(Tampered, match="another artifact"):
        load_label_set(sealed, digest)


def test_what_was_not_sealed_is_not_read_from_a_sealed_folder(sealed):
    (sealed / "more.json").write_text("{}")
    with pytest.raises(Tampered):
        content(sealed, "more.json")


def test_a_draft_is_read_as_it_is(tmp_path):
    write_evidence(tmp_path, {"chosen": "a"})
    assert read_evidence(tmp_path) == {"chosen": "a"}
    assert not (tmp_path / FILE).exists()
