import pytest
import torch

from training.tasks.intervals import ratio_interval, wilson


def test_wilson_is_the_textbook_interval():
    yes = torch.cat([torch.ones(45), torch.zeros(5)])
    assert wilson(yes) == [0.9, 0.7864, 0.9565, 50]
    assert wilson([True] * 45 + [False] * 5) == wilson(yes)
    assert wilson(torch.zeros(10))[1] == 0.0


def test_a_ratio_of_perplexities_lies_within_its_interval():
    ratio, low, high, tokens = ratio_interval([(10.0, 5), (12.0, 5)], [(10.0, 5), (11.0, 5)])
    assert low <= ratio <= high
    assert (ratio, tokens) == (pytest.approx(1.10517, abs=1e-4), 10)
