import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from registry import errors, manifest
from tests.drill import tampering

ABOUT = {"kind": "patch", "system": "attention_sink", "base": "tiny:0@" + "0" * 64, "config": {"k": 1}}


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "t.safetensors")
    manifest.write(folder, **ABOUT)
    return folder


def test_same_content_same_digest_wherever_it_lies(sealed, tmp_path):
    import shutil

    copy = shutil.copytree(sealed, tmp_path / "elsewhere" / "b")
    assert manifest.read(copy).digest == manifest.read(sealed).digest


def test_any_difference_changes_the_digest(sealed):
    first = manifest.read(sealed).digest
    (sealed / "report.json").write_text('{"a":1}')
    assert manifest.write(sealed, **ABOUT).digest != first
    assert manifest.write(sealed, **{**ABOUT, "config": {"k": 2}}).digest != first


def flip_a_byte(folder):
    file = folder / "t.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def swap_the_manifest(folder):
    other = json.loads((folder / "manifest.json").read_text())
    other["config"] = {"k": 2}
    (folder / "manifest.json").write_text(json.dumps(other))


def link_a_file(folder):
    (folder / "t.safetensors").rename(folder.parent / "out.safetensors")
    (folder / "t.safetensors").symlink_to(folder.parent / "out.safetensors")


def leave_the_folder(folder):
    about = json.loads((folder / "manifest.json").read_text())
    about["files"]["../../etc/passwd"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(about))


def claim_a_huge_header(folder):
    file = folder / "t.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 40) + file.read_bytes()[8:])
    about = json.loads((folder / "manifest.json").read_text())
    about["files"]["t.safetensors"] = manifest.sha256(file)
    (folder / "manifest.json").write_text(json.dumps(about))


SPOILED = {
    "a flipped byte": (flip_a_byte, errors.Tampered),
    "a swapped manifest": (swap_the_manifest, errors.Tampered),
    "a symbolic link": (link_a_file, errors.Linked),
    "a path outside": (leave_the_folder, errors.Outside),
    "a header beyond its limit": (claim_a_huge_header, errors.Oversize),
    "a manifest beyond its limit": (lambda f: (f / "manifest.json").write_text(" " * (2 << 20)), errors.Oversize),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), errors.Unsealed),
    "a missing file": (lambda f: (f / "report.json").unlink(), errors.Tampered),
    "a file more": (lambda f: (f / "extra.json").write_text("{}"), errors.Tampered),
    "a manifest that is not JSON": (lambda f: (f / "manifest.json").write_text("{"), errors.Tampered),
    "a manifest of other keys": (lambda f: (f / "manifest.json").write_text('{"a":1}'), errors.Tampered),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_is_refused_with_its_own_error(sealed, case):
    digest = manifest.read(sealed).digest
    spoil, error = SPOILED[case]
    spoil(sealed)
    with pytest.raises(error) as refused:
        # a swapped manifest agrees with its folder: only whoever knows the digest can tell
        manifest.read(sealed, digest=digest if case == "a swapped manifest" else None)
    assert type(refused.value) is error
    assert str(sealed) in str(refused.value)


def test_every_way_of_tampering_is_refused_in_words_of_its_own(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir()
    save_file({"a": np.ones(4, np.float32), "b": np.zeros((2, 3), np.float32)}, folder / tampering.FILE)
    digest = manifest.write(folder, **{**ABOUT, "parents": []}).digest
    n, wrong, words = tampering.attack(folder, lambda f: manifest.read(f, digest=digest), tmp_path)
    assert wrong == []
    assert words == n >= 78

    def still(place):
        if manifest.read(place).digest != digest:
            raise errors.BadArtifact("another, sound artifact")

    assert tampering.attack(folder, still, tmp_path)[1] == [], "without a digest to hold it to, nothing escapes either"


def test_the_wrong_base_is_refused(sealed):
    manifest.read(sealed, base="0" * 64)
    with pytest.raises(errors.WrongBase, match="Fit it again"):
        manifest.read(sealed, base="1" * 64)


def test_what_json_cannot_say_is_not_sealed(tmp_path):
    for bad in (float("nan"), float("inf"), object()):
        with pytest.raises(errors.ConfigError, match="cannot be sealed"):
            manifest.write(tmp_path, **{**ABOUT, "config": {"k": bad}})
    assert not (tmp_path / manifest.NAME).exists()


# ---- check and use are of the same bytes ---------------------------------------------------------------------------


def test_what_is_taken_is_what_was_hashed(tmp_path):
    from registry.errors import Tampered

    (tmp_path / "a.bin").write_bytes(b"one")
    about = manifest.write(tmp_path, kind="patch", system="attention_sink", base="b@" + "a" * 64, config={})
    manifest.read(tmp_path)
    assert manifest.take(tmp_path, about, "a.bin") == b"one"
    (tmp_path / "a.bin").write_bytes(b"two")  # swapped after it was read
    with pytest.raises(Tampered, match="not what was sealed"):
        manifest.take(tmp_path, about, "a.bin")
    with pytest.raises(Tampered):
        manifest.take(tmp_path, about, "gone.bin")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["manifest.json", "a.bin", "more"])
def test_a_pipe_is_named_and_nobody_waits_at_it(tmp_path, name):
    import os

    from registry.errors import Odd

    (tmp_path / "a.bin").write_bytes(b"one")
    manifest.write(tmp_path, kind="patch", system="attention_sink", base="b@" + "a" * 64, config={})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(Odd, match="a pipe where a file should be"):
        manifest.read(tmp_path)
