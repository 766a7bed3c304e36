"""What a recipe of mils names in the store: a patch on the scorer, a captioner to compare with."""

from pathlib import Path

import pytest

from registry import store
from registry.errors import NotFound
from training.mils.fit import sealed

DIGEST = "ab" * 32


@pytest.fixture
def means(monkeypatch):
    """What references mean in a store that holds one artifact."""
    known = {"clip_sae@champion": DIGEST, "clip_sae": "base"}
    monkeypatch.setattr(store, "resolve", lambda ref, ledger: known[ref])
    monkeypatch.setattr(store, "pull", lambda digest: Path("/artifacts") / digest)


def test_a_reference_is_the_artifact_it_means(means):
    """The recipes `typographic` and `company` name a champion, and were refused as "not a digest"."""
    assert sealed("clip_sae@champion") == Path("/artifacts") / DIGEST


def test_a_folder_is_itself(tmp_path):
    assert sealed(str(tmp_path)) == tmp_path


def test_the_base_has_no_patch(means):
    with pytest.raises(NotFound, match="clip_sae is the base itself"):
        sealed("clip_sae")
