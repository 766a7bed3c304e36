"""The two functions of scipy.special that a service asks while it judges; importing them takes .3 s of its start."""

import math


def log_beta(a: float, b: float) -> float:
    """Logarithm of the beta function of a, b > 0."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def x_log_y(x: float, y: float) -> float:
    """x log y, and 0 for x = 0 whatever y is."""
    return 0.0 if x == 0 else x * math.log(y) if y > 0 else -x * math.inf
