"""What stands for scipy.special, beside it."""

import pytest
from scipy.special import betaln, xlogy

from registry.ab.special import log_beta, x_log_y


def test_special_functions_are_scipys():
    for a, b in [(0.5, 0.5), (1e-3, 7.0), (40.5, 60.5), (3e4, 2.0), (1e6, 1e6 + 0.5)]:
        assert log_beta(a, b) == pytest.approx(betaln(a, b), abs=1e-8)
    for x, y in [(0.0, 0.0), (0.0, 0.3), (2.5, 0.3), (1e5, 1 - 1e-9), (1e-9, 0.0)]:
        assert x_log_y(x, y) == pytest.approx(xlogy(x, y), abs=1e-12)
