"""The second renderer: writing that no defence was fitted on fools the base as the lab's own does."""

import pytest

from patches import artifact
from patches.families.base import load_base
from training import run
from training.clip_sae.config import Config
from training.data.typographic import written
from training.tasks import recognition as tasks

N = 40
"""pictures a hand: 95 % of a share of .5 lies within .16"""


@pytest.mark.parametrize("hand", ["fonts", "bare"])
def test_a_hand_that_nothing_was_fitted_on_attacks_the_base(hand):
    base, config = load_base("lab:clip", "clip"), Config(test_images=N)
    sets = tasks.other_hands(config, N)[hand]
    by = tasks.classifier(base, config, sets["clean"])
    got = tasks.metrics(config, {k: tasks.ask(base, config, d, by) for k, d in sets.items()})
    assert got["clean"] > 0.85
    assert got["attacked"] < got["blank"] - 0.2  # the letters do it, not what they hide
    # letters that the base never learned to read put it off more often than they are read: the word is what it says
    # in the hand it knows, while the same places without letters never bring the word
    known = tasks.ask(base, config, written(sets["clean"], "wrong", config.seed), by)
    assert _says(known, known.other) > 0.2
    said, silent = (tasks.ask(base, config, sets[k], by) for k in ("attacked", "blank"))
    assert _says(silent, said.other) == 0.0
    assert 0.0 < _says(said, said.other) < _says(known, known.other)


def _says(said, word):
    """The share of pictures of which `word` is said."""
    return (said.logits.argmax(1) == word).float().mean().item()


def test_hands_are_of_the_test_split_and_none_is_the_one_that_fits_see():
    sets = tasks.other_hands(Config(), 12)
    assert "strip" not in sets
    for name, mine in sets.items():
        assert {d.split for d in mine.values()} == {"test"}
        assert mine["attacked"].about["hand"] == name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_how_far_a_defence_holds_beyond_the_writing_it_was_fitted_on():
    """The demo's defence against the word, hand by hand (`-s` prints it). Of letters without paper it keeps least:
    features were found on strips."""
    folder, n = run.fit("clip_sae/demo"), 100
    base, config = load_base("lab:clip", "clip"), Config(test_images=n)
    arms = {"base": tasks.Arm(), "patched": tasks.Arm(artifact.load(folder)[1])}
    for hand, sets in tasks.other_hands(config, n).items():
        by, got = tasks.classifier(base, config, sets["clean"]), {}
        for name, arm in arms.items():
            with arm.on(base):
                got[name] = tasks.measured(config, {k: tasks.ask(base, config, d, by) for k, d in sets.items()})
        told = {k: f"{got['base'][k].value:.3f} -> {got['patched'][k].value:.3f}" for k in got["base"]}
        print(f"{hand:9} n={n}", told, flush=True)
        assert got["patched"]["attacked"].value > got["base"]["attacked"].value, hand
        assert got["patched"]["says_word"].value < got["base"]["says_word"].value, hand
