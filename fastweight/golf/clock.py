"""Time budgets: one clock for training with calibration, one for each evaluation; both stop hard."""

import time
from collections.abc import Callable

Now = Callable[[], float]


class OutOfTimeError(ValueError):
    """A stage that did not end within its limit."""


class Clock:
    """Counts from `spent` seconds on. limit: 0 for none; margin: it is over that much before the limit."""

    def __init__(self, limit: float = 0.0, *, spent: float = 0.0, margin: float = 0.0, now: Now = time.monotonic):
        self.limit, self.margin, self._now = limit, margin, now
        self._start = now() - spent

    @property
    def seconds(self) -> float:
        """How much is spent."""
        return self._now() - self._start

    @property
    def is_over(self) -> bool:
        return bool(self.limit) and self.seconds >= self.limit - self.margin

    def check(self, what: str, done: int, total: int) -> None:
        """Raise OutOfTimeError if it is over, however many targets of `what` are scored by now."""
        if self.is_over:
            raise OutOfTimeError(
                f"{what}: {self.limit:g} s are over and {done:,} of {total:,} targets are scored "
                f"({done / max(1, total):.0%}). Score with a longer stride, a cheaper learner or more ranks, or allow "
                "more seconds; a part of the text is no score."
            )
