"""Learning-rate schedules: a warm-up by steps times a decay by the fraction of the run that is over."""

import math
from dataclasses import dataclass
from typing import Literal

from fastweight.configs import check_types, require

ScheduleKind = Literal["cosine", "wsd", "linear"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run: a linear warm-up, then a decay.

    cosine: half a period from the warm-up to the end (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5); wsd:
    constant, then 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392); linear: constant, then linear.
    """

    kind: ScheduleKind = "cosine"
    """The decay."""
    warmup_steps: int = 0
    """Steps of the rise from 0 to the peak."""
    zero_first: bool = False
    """Count the rise from 0, as optax does: the first update has rate 0. Else it has peak/warmup_steps."""
    decay_steps: int = 0
    """Steps of the fall at the end (wsd, linear). 0: a fifth of the run for wsd, all after the warm-up for linear."""
    decay_fraction: float = 0.0
    """The same as a part of the run, by steps or by the clock; 0: decay_steps counts."""
    final_ratio: float = 0.1
    """The last rate as a part of the peak."""
    final_lr: float | None = None
    """The last rate itself; replaces final_ratio."""
    weight_decay_final_ratio: float = 1.0
    """The weight decay falls in a straight line to this part of its own at the end of the run."""
    weight_decay_fraction: float = 0.3
    """The last part of the run, in which it falls."""

    def __post_init__(self) -> None:
        check_types(self, "schedule")
        require(self.warmup_steps >= 0, f"schedule: warmup_steps must not be negative, got {self.warmup_steps}.")
        require(self.decay_steps >= 0, f"schedule: decay_steps must not be negative, got {self.decay_steps}.")
        require(
            self.kind != "cosine" or (self.decay_steps == 0 and self.decay_fraction == 0),
            'schedule: "cosine" decays over the whole run and takes no decay_steps. Use kind="wsd" or "linear".',
        )
        for name in ("decay_fraction", "weight_decay_final_ratio", "weight_decay_fraction"):
            require(0 <= getattr(self, name) <= 1, f"schedule: {name} must lie in [0, 1], got {getattr(self, name)}.")
        require(
            self.decay_steps == 0 or self.decay_fraction == 0,
            f"schedule: decay_steps {self.decay_steps} and decay_fraction {self.decay_fraction} exclude each other.",
        )
        require(0 <= self.final_ratio <= 1, f"schedule: final_ratio must lie in [0, 1], got {self.final_ratio}.")
        require(self.final_lr is None or self.final_lr >= 0, f"schedule: final_lr is negative: {self.final_lr}.")


def schedule_factor(
    config: ScheduleConfig, step: int, total_steps: int, peak: float, fraction: float | None = None
) -> float:
    """The learning rate of update `step` (0, 1, ... total_steps - 1) as a part of its peak.

    peak: the rate that `final_lr` is compared with. fraction: the part of the run that is over, in [0, 1]; None:
    step / total_steps. A run with a time budget passes the part of its time instead.
    """
    floor = config.final_ratio if config.final_lr is None else min(1.0, config.final_lr / peak)
    fraction = step / total_steps if fraction is None else fraction
    start = _decay_start(config, total_steps)
    progress = min(1.0, max(0.0, (fraction - start) / (1 - start))) if start < 1 else 0.0
    return _warmup(config, step) * (floor + (1 - floor) * _decay(config.kind, progress))


def weight_decay_factor(config: ScheduleConfig, fraction: float) -> float:
    """The weight decay as a part of its own when `fraction` of the run, in [0, 1], is over."""
    length = config.weight_decay_fraction
    progress = min(1.0, max(0.0, (fraction - (1 - length)) / length)) if length else 0.0
    return 1 - (1 - config.weight_decay_final_ratio) * progress


def _warmup(config: ScheduleConfig, step: int) -> float:
    if step >= config.warmup_steps:
        return 1.0
    return (step if config.zero_first else step + 1) / config.warmup_steps


def _decay_start(config: ScheduleConfig, total_steps: int) -> float:
    """The part of the run after which the rate falls."""
    if config.decay_fraction:
        return 1 - config.decay_fraction
    decay_steps = config.decay_steps
    if config.kind == "wsd" and decay_steps == 0:
        decay_steps = max(1, total_steps // 5)
    if decay_steps == 0:
        return min(1.0, config.warmup_steps / total_steps)
    return max(0.0, 1 - decay_steps / total_steps)


def _decay(kind: str, progress: float) -> float:
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - (math.sqrt(progress) if kind == "wsd" else progress)
