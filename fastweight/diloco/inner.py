"""A worker's inner steps: step n of a run reads samples n · batch_size onwards, at the learning rate of step n.

Both depend on n alone, not on who makes the step or when, so a lease that is given out again is the same work.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastweight.configs import require
from fastweight.data import Batch, Store
from fastweight.model import Model
from fastweight.optim import Optimizer, schedule_factor, weight_decay_factor
from fastweight.train import TrainConfig
from fastweight.train.compiling import tracing
from fastweight.train.loss import count
from fastweight.train.objectives import make_objective
from fastweight.train.prepare import set_checkpointing
from fastweight.train.rounding import rounded
from fastweight.train.source import step_batches, training_splits


class Made(NamedTuple):
    """One inner step: summed loss in nats (NaN if the step was skipped), targets, tokens read."""

    nats: float
    targets: int
    tokens: int


class Inner:
    """Model, inner optimiser and data of one worker. The optimiser's memory is never sent anywhere."""

    def __init__(self, model: Model, store: Store, config: TrainConfig):
        self.model, self.config = model, config
        self.splits = training_splits(store, config.data)
        self.objective = make_objective(model, config)
        self.optimizer = Optimizer(model, config.optimizer)
        self.bad_row = 0
        model.train()
        set_checkpointing(model, config)
        if config.compile:
            for block in model.blocks:
                block.compile()
        self._batches: Iterator[list[Batch]] = iter(())

    def start(self, number: int) -> None:
        """Go to step `number`."""
        self._batches = step_batches(self.splits, self.config.data, self.config.seed, number)

    def step(self, number: int) -> Made:
        """Make step `number`, the next one. Raises ValueError after too many steps in a row that are not finite."""
        batches = next(self._batches)
        targets = count(batches).targets
        with rounded(self.model, self.config.rounding, number / self.config.steps):
            nats, norm = self._gradients(batches, max(1, targets))
        if math.isfinite(nats) and math.isfinite(norm):
            self._apply(number)
            self.bad_row = 0
        else:
            nats, self.bad_row = math.nan, self.bad_row + 1
        self.optimizer.zero_grad()
        require(
            self.bad_row < self.config.max_bad_steps,
            f"{self.bad_row} inner steps in a row, up to {number}, were not finite. Lower optimizer.lr or outer.lr.",
        )
        return Made(nats, targets, sum(batch.tokens.numel() for batch in batches))

    def _gradients(self, batches: list[Batch], num_targets: int) -> tuple[float, float]:
        """The summed loss and the gradient norm; the gradients are clipped."""
        device = self.model.device
        total = torch.zeros((), device=device)
        totals = [value or 1.0 for value in self.objective.totals(batches)]
        with tracing() if self.config.compile else contextlib.nullcontext():
            for batch in batches:
                sums, _ = self.objective.learn(batch.to(device, non_blocking=True), None, num_targets, totals)
                total = total + sums[0]
        parameters = list(self.optimizer.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        return float(total), float(norm)

    def _apply(self, number: int) -> None:
        config = self.config
        self.optimizer.set_factor(schedule_factor(config.schedule, number, config.steps, config.optimizer.lr))
        self.optimizer.set_decay_factor(weight_decay_factor(config.schedule, number / config.steps))
        self.optimizer.set_step(number)
        self.optimizer.step()
