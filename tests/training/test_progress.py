"""A fit is never silent: one line at the start, a line in ten silent seconds; short phases add none."""

import io
import re
import time

import pytest

from training import progress, run


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def often(monkeypatch):
    """Every 0.2 s instead of every 10."""
    monkeypatch.setattr(progress, "EVERY_S", 0.2)
    monkeypatch.setattr(progress, "_spoke", time.monotonic())


def test_without_a_terminal_a_long_phase_says_a_line_every_ten_seconds(often, capsys):
    for _ in progress.tqdm(range(50), "gates", disable=None, leave=False):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 8, lines
    assert re.fullmatch(r"  gates: \d+ of 50 \(\d+%\), \d+ s, about \d+ s left", lines[0])
    assert re.fullmatch(r"  gates: 50 of 50 \(100%\), \d s, done", lines[-1])
    assert "\r" not in "".join(lines)


def test_short_phases_and_silenced_ones_say_nothing(often, capsys):
    for _ in range(3):
        for _ in progress.tqdm(range(4), "words", disable=None, leave=False):
            time.sleep(0.01)
    for _ in progress.tqdm(range(20), "silent", disable=True):
        time.sleep(0.02)
    assert capsys.readouterr().err == ""


def test_in_a_terminal_it_is_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    for _ in progress.tqdm(range(3), "gates", disable=None, mininterval=0, file=screen):
        pass
    assert "3/3" in screen.getvalue()
    assert "\r" in screen.getvalue()


def test_work_without_phases_is_told_as_well(monkeypatch, capsys, home):
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.told("fit x/lab", "x"):
        time.sleep(1.3)
    assert re.match(r"  fit x/lab: \d s so far\n", capsys.readouterr().err)
    assert progress.last_time("x") == pytest.approx(1.3, abs=0.6)
    assert progress.last_time("y") is None


@pytest.fixture
def quick(monkeypatch, home):
    """A system whose fit seals nothing but its manifest."""
    from registry import manifest
    from training import toto

    def fit(config, folder):
        return manifest.write(folder, kind="model", system="toto", config={"steps": config.steps})

    monkeypatch.setattr(toto, "fit", fit)


def test_a_fit_says_at_once_what_it_does_and_how_long_it_took_before(quick, capsys):
    run.fit("toto/tiny")
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "fit toto/tiny: base tiny:toto-motions; device cpu; steps 12; seconds"
    run.fit("toto/tiny")
    assert "took 0 s the last time" in capsys.readouterr().err.splitlines()[0]
    run.fit("toto/tiny", ["steps=13"])
    assert "the last time" not in capsys.readouterr().err, "another config is another fit"


def test_the_recipe_that_is_taken_when_none_is_named_is_told(quick, capsys):
    run.fit("toto")
    assert "fit toto/lab (its usual recipe; others: patchbay fit --help): " in capsys.readouterr().err
