"""The second renderer: writing that no defence was fitted on fools the base as the lab's own does."""

import pytest

from patches.families.base import load_base
from training.clip_sae.config import Config
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
    assert got["says_word"] > 0.2


def test_hands_are_of_the_test_split_and_none_is_the_one_that_fits_see():
    sets = tasks.other_hands(Config(), 12)
    assert "strip" not in sets
    for name, mine in sets.items():
        assert {d.split for d in mine.values()} == {"test"}
        assert mine["attacked"].about["hand"] == name
