"""Half-written folders of those who are gone are swept; nobody's work in hand is."""

import os
import subprocess
import sys

import pytest

from registry import home


def gone():
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture
def named(tmp_path, monkeypatch):
    def named(number, host=None):
        if host is not None:
            monkeypatch.setattr(home, "_machine", lambda: host)
        monkeypatch.setattr(home.os, "getpid", lambda: number)
        made = tmp_path / f"{home.part_prefix()}x1"
        made.mkdir()
        (made / "half").write_text("x")
        monkeypatch.undo()
        return made

    return named


def test_of_a_process_that_ended_it_is_removed_and_of_one_that_lives_it_stays(named, tmp_path):
    old, mine, first = named(gone()), named(os.getpid()), named(1)
    (tmp_path / "clip_sae-0123").mkdir()
    home.swept(tmp_path)
    assert not old.exists()
    assert mine.exists()
    assert first.exists()
    assert (tmp_path / "clip_sae-0123").exists()


def test_of_another_machine_and_of_older_releases_a_day_decides(named, tmp_path):
    other, older, link = named(gone(), "a-host"), tmp_path / ".part-abcd12", tmp_path / ".part-link"
    older.mkdir()
    link.symlink_to(tmp_path)
    home.swept(tmp_path)
    assert other.exists()
    assert older.exists()
    for folder in (other, older):
        os.utime(folder, (1, 1))
    home.swept(tmp_path)
    assert not other.exists()
    assert not older.exists()
    assert link.exists(), "links are not followed"
