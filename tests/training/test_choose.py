"""The choice among candidates: worth, ties, and the smallest of those that are as good."""

import pytest

from training.choose import Offer, best, worth


def test_what_keeps_too_little_is_worth_less_than_anything_that_keeps_enough():
    assert worth(0.6, kept=0.95, floor=0.94) == 0.6
    assert worth(0.0, kept=0.94, floor=0.94) == 0.0
    assert worth(0.9, kept=0.90, floor=0.94) == pytest.approx(-0.04)
    assert worth(0.9, kept=0.94 - 1e-12, floor=0.94) == 0.9  # the same share, summed in another order


@pytest.mark.parametrize(
    ("within", "worths", "want"),
    [
        (0.0, {2: 0.60, 4: 0.60, 8: 0.61}, 8),
        (0.02, {2: 0.50, 4: 0.60, 8: 0.61}, 4),
        (0.2, {2: 0.50, 4: 0.60, 8: 0.61}, 2),
        (0.02, {2: -0.03, 4: -0.02, 8: -0.01}, 8),  # none keeps what must stay: the nearest to it
    ],
)
def test_the_smallest_is_taken_of_what_is_as_good(within, worths, want):
    offers = [Offer(n, {"worth": v}, 0.9, n) for n, v in worths.items()]
    assert best(offers, within).what == want


def test_of_equals_what_keeps_most_is_taken():
    offers = [Offer(n, {"worth": 0.6}, kept, n) for n, kept in ((2, 0.8), (4, 0.9))]
    assert best(offers) is offers[1]


def test_of_equals_in_everything_the_first_is_taken():
    offers = [Offer(n, {"worth": 0.6}) for n in range(3)]
    assert best(offers) is offers[0]
