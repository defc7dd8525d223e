"""Means over seeds, and whether two sets of runs differ by more than their seeds do."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (n − 1); None for a single value."""
    if len(values) < 2:
        return None
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - 1))


def welch_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of Welch's test that both have one mean (Welch 1947); None with fewer than two values in one of them.

    Samples without any spread give 1 where their means are equal, else 0.
    """
    if min(len(first), len(second)) < 2:
        return None
    parts = [(deviation(sample) or 0.0) ** 2 / len(sample) for sample in (first, second)]
    difference, variance = mean(first) - mean(second), sum(parts)
    if variance == 0:
        return 1.0 if difference == 0 else 0.0
    freedom = variance**2 / sum(v**2 / (len(s) - 1) for v, s in zip(parts, (first, second), strict=True))
    return student_p(difference / math.sqrt(variance), freedom)


def student_p(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|) of Student's t: I_x(freedom / 2, 1 / 2) at x = freedom / (freedom + t²)."""
    return _regular_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def _regular_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):
        return 1 - _regular_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value = 0.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        value = odd / (1 + even / (1 + value))
    return front / (1 + value)
