"""Is a difference more than noise? Paired comparisons, over the same documents and the same prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Mean of first − second over `count` pairs. error: its standard error, None for a single pair."""

    mean: float
    error: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % interval by Student's t; None for a single pair."""
        return None if self.error is None else self.error * t_value(self.count - 1)

    @property
    def sign(self) -> int | None:
        """−1 or 1 where the interval leaves out 0, 0 where it does not, None where there is no interval."""
        if self.half_width is None:
            return None
        return 0 if abs(self.mean) <= self.half_width else int(math.copysign(1, self.mean))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean difference of two measurements of the same things, and its standard error."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return Difference(mean, None, count)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (count - 1)
    return Difference(mean, math.sqrt(variance / count), count)


def t_value(degrees: int) -> float:
    """The two-sided 95 % point of Student's t; beyond 30 degrees Fisher's expansion (within 0.001)."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.95996 + 2.372 / degrees + 2.82 / degrees**2


def sign_test(first: Sequence[bool], second: Sequence[bool]) -> int:
    """1 if `first` is right more often than `second` beyond chance, −1 if less, else 0.

    Exact two-sided sign test at 5 % on the prompts where they differ (McNemar 1947).
    """
    wins = sum(a and not b for a, b in zip(first, second, strict=True))
    losses = sum(b and not a for a, b in zip(first, second, strict=True))
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1)) / 2**trials
    return 0 if 2 * tail > LEVEL else (1 if wins > losses else -1)
