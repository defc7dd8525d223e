"""Averages of the weights over the steps of a run, in float32: better weights than the last for the same training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastweight.configs import check_types, require
from fastweight.optim import foreach

AverageKind = Literal["none", "ema", "swa"]
AverageStart = Literal["corrected", "copy"]
SEEN = "|seen"
EVERY = {"ema": 1, "swa": 50}


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """A second set of weights, the average of those of the run, which the run ends with.

    ema: s ← d s + (1 - d) w (Polyak & Juditsky 1992); swa: the plain mean of snapshots from late in the run
    (Izmailov et al. 2018, arXiv:1803.05407).
    """

    kind: AverageKind = "none"
    """ema: exponential moving average; swa: mean of snapshots once the rate is low."""
    decay: float = 0.9965
    """d of ema. Runs below 5,000 steps want 0.99 to 0.995."""
    start: AverageStart = "corrected"
    """ema. corrected: the weights of the first step have no share (divided by 1 - d^n); copy: starts as a copy of the
    initial weights, whose share after n steps is d^n."""
    every: int = 0
    """Steps between averaged weights; 0: 1 for ema, 50 for swa."""
    start_factor: float = 0.3
    """swa: the first snapshot is taken when the learning rate has fallen below this part of its peak."""

    def __post_init__(self) -> None:
        check_types(self, "averaging")
        require(0 < self.decay < 1, f"averaging: decay must lie strictly between 0 and 1, got {self.decay}.")
        require(self.every >= 0, f"averaging: every must not be negative, got {self.every}.")
        require(0 < self.start_factor <= 1, f"averaging: start_factor must lie in (0, 1], got {self.start_factor}.")


class WeightAverage:
    """The average of named weights, kept in float32 whatever their dtype.

    initial: the weights before the first step. The tensors are read again at every `update`.
    """

    def __init__(self, config: AveragingConfig, initial: Mapping[str, Tensor]):
        require(config.kind != "none", 'averaging: kind is "none"; nothing to average.')
        self.config = config
        self.seen = 0
        self._weights = dict(initial)
        self._average = {name: w.detach().to(torch.float32, copy=True) for name, w in initial.items()}

    @property
    def count(self) -> int:
        """How many sets of weights are in the average, the initial ones not counted."""
        return -(-self.seen // (self.config.every or EVERY[self.config.kind]))

    @property
    def initial_share(self) -> float:
        """The share of the initial weights: d^n for a copy start, else 0. 1 before anything was averaged."""
        if self.count == 0:
            return 1.0
        return self.config.decay**self.count if self._is_copy() else 0.0

    @torch.no_grad()
    def update(self, factor: float = 1.0) -> None:
        """Take in the weights after a step that was made at `factor` times the peak rate, if they are due.

        A rate that is still rising in a warm-up counts as 1: snapshots are taken once it has fallen.
        """
        if self.config.kind == "swa" and self.seen == 0 and factor >= self.config.start_factor:
            return
        before, self.seen = self.count, self.seen + 1
        if self.count > before:
            new = [w.detach().float() for w in self._weights.values()]
            foreach.lerp_(list(self._average.values()), new, self._share())

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights in float32."""
        return dict(self._average)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that is needed to go on, as named tensors."""
        return {**self._average, SEEN: torch.tensor(self.seen)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises ValueError naming what does not fit."""
        wanted = {name: tuple(t.shape) for name, t in self.state_tensors().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        require(not wrong, f"averaged weights: {', '.join(wrong[:5])} missing, unknown or of another shape.")
        self.seen = int(tensors[SEEN])
        for name, average in self._average.items():
            average.copy_(tensors[name])

    def _is_copy(self) -> bool:
        return self.config.kind == "ema" and self.config.start == "copy"

    def _share(self) -> float:
        """The share of the newest weights in the average, which then sums to one."""
        if self.config.kind == "swa":
            return 1 / self.count
        d = self.config.decay
        return 1 - d if self._is_copy() else (1 - d) / (1 - d**self.count)
