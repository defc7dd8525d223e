"""The weight μ of the memory as a function of the optimiser step."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from fastweight.configs import check_types, from_dict, near_names, require

KINDS = ("constant", "linear", "cosine", "cyclic")
UNWRAPPED = ("initial", "final", "steps", "period", "stagger")


@dataclass(frozen=True)
class MagSchedule:
    """μ of a layer when `step` optimiser steps have been taken; every value is in [0, 1].

    kind: "constant": `final` at every step. "linear", "cosine": from `initial` at step 0 to `final` at step `steps`,
    which it keeps. "cyclic": values[0], values[1], … for `period` steps each, and again from the first.
    stagger: layer i starts i · stagger steps later; negative: the last layer starts first. Until then a layer has the
    value of step 0. A tuple of one number stands for that number.
    """

    kind: str = "linear"
    initial: float = 0.0
    final: float = 0.5
    steps: int = 100
    values: tuple[float, ...] = ()
    period: int = 1
    stagger: int = 0

    def __post_init__(self) -> None:
        for name in UNWRAPPED:
            value = getattr(self, name)
            if isinstance(value, (tuple, list)) and len(value) == 1:
                object.__setattr__(self, name, value[0])
        object.__setattr__(self, "values", tuple(self.values))
        check_types(self, "mag schedule")
        require(self.kind in KINDS, f"mag schedule: unknown kind {self.kind!r}.{near_names(self.kind, KINDS)}")
        for name, value in [("initial", self.initial), ("final", self.final), *(("values", v) for v in self.values)]:
            require(0 <= value <= 1, f"mag schedule: {name} must be in [0, 1], got {value}.")
        require(self.steps >= 1, f"mag schedule: steps must be at least 1, got {self.steps}.")
        require(self.period >= 1, f"mag schedule: period must be at least 1, got {self.period}.")
        require(
            bool(self.values) == (self.kind == "cyclic"),
            f'mag schedule: kind "cyclic", and no other, needs values; got kind {self.kind!r} with {self.values}.',
        )

    def at(self, step: int, layer: int = 0, num_layers: int = 1) -> float:
        """μ of `layer` (counted among the `num_layers` that have one) when `step` optimiser steps have been taken.

        The step that is about to be taken, the first included, runs with at(0), at(1), …
        """
        require(step >= 0, f"mag schedule: step must not be negative, got {step}.")
        require(0 <= layer < num_layers, f"mag schedule: layer {layer} is not one of {num_layers} layers.")
        waits = layer if self.stagger >= 0 else num_layers - 1 - layer
        own = max(step - waits * abs(self.stagger), 0)
        if self.kind == "cyclic":
            return self.values[own // self.period % len(self.values)]
        if self.kind == "constant" or own >= self.steps:
            return self.final
        share = own / self.steps
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.initial + (self.final - self.initial) * share

    def end(self, num_layers: int = 1) -> int:
        """The first step at which all layers have their final value; 0 for kinds without an end."""
        if self.kind in ("constant", "cyclic"):
            return 0
        return self.steps + abs(self.stagger) * (num_layers - 1)

    def levels(self) -> set[float]:
        """The values that the schedule stands at or moves between."""
        if self.kind == "cyclic":
            return set(self.values)
        return {self.final} if self.kind == "constant" else {self.initial, self.final}

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self) | {"values": list(self.values)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "MagSchedule":
        """The inverse of `to_dict`; unknown and missing keys are named."""
        return from_dict(MagSchedule, data)
