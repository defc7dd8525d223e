"""How often the steps of a run visit the core of a model with depth recurrence."""

import hashlib
from dataclasses import dataclass
from typing import Any

from fastweight.configs import check_types, require
from fastweight.model import Model


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often a step visits the core (`loops` of the model's config). By default always as often as the model says.

    Steps draw their number by the run's seed and their own number, so that a resumed run draws the same.
    """

    sample_min: int = 0
    """Each step draws its loops evenly from sample_min to the model's own number; 0: no drawing."""
    on_at: float = 0.0
    """Part of the run (of its time, where max_seconds is set) before which the core is visited once."""

    def __post_init__(self) -> None:
        check_types(self, "loops")
        require(self.sample_min >= 0, f"loops: sample_min must not be negative, got {self.sample_min}.")
        require(0 <= self.on_at <= 1, f"loops: on_at is a part of the run and must lie in [0, 1], got {self.on_at}.")

    @property
    def moves(self) -> bool:
        """Whether steps differ in their loops."""
        return self.sample_min > 0 or self.on_at > 0


def check_loops(model: Model, config: LoopConfig) -> None:
    """Refuse loops that this model does not have."""
    if not config.moves:
        return
    loops = model.config.loops
    require(
        loops is not None,
        "loops: this model has no loops (start, stop, count), so there is no core to visit more or less often. Set "
        "loops.sample_min and loops.on_at to 0, or give its config `loops` in place of `order`.",
    )
    assert loops is not None
    require(
        config.sample_min <= loops[2],
        f"loops: sample_min is {config.sample_min}, the model visits its core {loops[2]} times. Lower it.",
    )


class LoopFollower:
    """Sets a model's loops for the step to come. Where the config never moves them it does nothing."""

    def __init__(self, model: Model, config: LoopConfig, seed: int):
        self.model, self.config, self.seed = model, config, seed
        self.count: int | None = None

    def set(self, step: int, fraction: float) -> None:
        """Step number `step` (0, 1, ...) is about to be made, `fraction` of the run is over."""
        loops = self.model.config.loops
        if not self.config.moves or loops is None:
            return
        lowest, most = self.config.sample_min or loops[2], loops[2]
        on = fraction >= self.config.on_at
        self._set(lowest + draw(self.seed, step, most - lowest + 1) if on else 1)

    def settle(self, fraction: float) -> None:
        """Between steps, for measuring: the model's own loops, or 1 while they are not on yet."""
        if self.config.moves:
            self._set(None if fraction >= self.config.on_at else 1)

    def describe(self) -> dict[str, Any]:
        """For the metrics: the loops of the last step."""
        return {} if self.count is None else {"loops": self.count}

    def _set(self, count: int | None) -> None:
        self.model.set_loops(count)
        self.count = self.count if count is None else count


def draw(seed: int, step: int, choices: int) -> int:
    """A number from 0 to choices - 1, the same for a seed and step on every machine."""
    digest = hashlib.sha256(f"loops {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8]) % choices
