"""Training that knows it will be packed: for a part of the run, blocks compute with rounded or noisy weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastweight.artifact import PackSpec, fake_quantised
from fastweight.configs import check_types, require
from fastweight.model import Model

RoundingMode = Literal["none", "round", "noise"]
RoundedBlocks = Literal["looped", "all"]


@dataclass(frozen=True, kw_only=True)
class RoundingConfig:
    """Fake quantisation of linear layers in training steps; parameters stay as they are, gradients pass straight
    through. Measuring and the final model are without it."""

    mode: RoundingMode = "none"
    """round: weights as they would be read back; noise: uniform noise of a step's width instead."""
    start: float = 0.5
    """Part of the run (of its time, where max_seconds is set) before which nothing is rounded."""
    blocks: RoundedBlocks = "looped"
    """looped: blocks that are visited more than once, where errors add up; all: every block."""
    spec: PackSpec = field(default_factory=PackSpec)
    """Widths and clips."""

    def __post_init__(self) -> None:
        check_types(self, "rounding")
        require(0 <= self.start <= 1, f"rounding: start is a part of the run and must lie in [0, 1], got {self.start}.")


def check_rounding(model: Model, config: RoundingConfig) -> None:
    """Refuse rounding that would round nothing."""
    looped = len(set(model.config.visits)) < len(model.config.visits)
    require(
        config.mode == "none" or config.blocks == "all" or looped,
        'rounding: no block of this model is visited twice, so "looped" would round nothing. Set rounding.blocks to '
        '"all", or rounding.mode to "none".',
    )


@contextmanager
def rounded(model: Model, config: RoundingConfig, fraction: float) -> Iterator[None]:
    """Inside, `model` computes as `config` says for when `fraction` of the run is over; backward passes, too, belong
    inside."""
    if config.mode == "none" or fraction < config.start:
        yield
        return
    blocks = None if config.blocks == "looped" else range(len(model.config.blocks))
    with fake_quantised(model, config.spec, blocks=blocks, mode=config.mode):
        yield
