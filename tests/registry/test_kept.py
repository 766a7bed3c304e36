"""A sealed folder is at its place whole, or not at all."""

import shutil

import pytest

from patches import artifact
from patches.mechanisms.sink import SinkConfig, SinkEdit
from registry import kept, manifest
from registry.errors import Tampered
from registry.home import home as place


@pytest.fixture
def sealed(home, tiny_llm, tmp_path):
    """(folder, digest) of a sealed patch outside the home."""
    folder = tmp_path / "sealed"
    about = artifact.save(SinkEdit(SinkConfig(neurons=((0, 1),)), {}), "attention_sink", folder, base=tiny_llm.label)
    return folder, about.digest


@pytest.mark.parametrize("where", ["artifacts", "runs"])
def test_a_copy_that_is_cut_off_leaves_nothing_and_the_next_one_is_whole(sealed, monkeypatch, where):
    """Whoever is killed while copying: `artifacts` by push or pull, `runs` by an edit that a request keeps."""
    folder, digest = sealed
    to = place() / where / digest

    def cut(source, target, **_):
        target.mkdir()
        shutil.copy(source / manifest.NAME, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        with pytest.raises(KeyboardInterrupt):
            kept.copied(folder, digest, to)
    assert not to.exists()
    assert kept.copied(folder, digest, to) == to
    assert manifest.read(to, digest=digest).digest == digest


def test_a_folder_that_was_tampered_with_is_copied_nowhere(sealed):
    folder, digest = sealed
    (folder / manifest.NAME).write_bytes((folder / manifest.NAME).read_bytes().replace(b"[0,1]", b"[0,2]"))
    with pytest.raises(Tampered):
        kept.copied(folder, digest, place() / "runs" / "x")
    assert not (place() / "runs" / "x").exists()
