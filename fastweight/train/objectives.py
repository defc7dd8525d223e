"""What a step makes smaller: one class per objective, each with a training and a scoring pass over a micro-batch."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fastweight.data import Batch
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.train.config import TrainConfig
from fastweight.train.heads import Heads
from fastweight.train.loss import score_batch, train_on


class Objective(Protocol):
    """Sums over the targets that are asked for; the loop divides them by their number.

    The first sum is the cross-entropy of the text in nats; in `learn` only if `reads_text`.
    """

    reads_text: bool

    def totals(self, batches: Sequence[Batch]) -> list[float]:
        """What beside the number of targets the loss is divided by; the loop adds it up over the step."""
        ...

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float]
    ) -> tuple[Tensor, ModelState | None]:
        """Add a micro-batch's gradients of the loss / num_targets; its sums [P] and the state after it, detached.

        num_targets, totals: of the whole step.
        """
        ...

    def score(self, batch: Batch) -> Tensor:
        """The sums [P] of a batch, each row from its own start; without gradients."""
        ...

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        """Names for the means of the sums after the first; `loss` is what is made smaller."""
        ...


class NextToken:
    """Cross-entropy of the text. Sums: itself alone."""

    reads_text = True

    def __init__(self, model: Model, precision: str):
        self.model, self.precision = model, precision

    def totals(self, batches: Sequence[Batch]) -> list[float]:
        return []

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float] = ()
    ) -> tuple[Tensor, ModelState | None]:
        nats, after = train_on(self.model, batch, state, num_targets, self.precision)
        return nats[None], after

    def score(self, batch: Batch) -> Tensor:
        return score_batch(self.model, batch, self.precision)[None]

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        return {}


def make_objective(model: Model, config: TrainConfig) -> Objective:
    """The objective that `config` names. Raises ValueError if `model` cannot learn it."""
    kind = config.objective.kind
    if kind == "next-token":
        if model.config.tokens_ahead > 1 or config.objective.head_weights or config.data.weights:
            return Heads(model, config.objective, config.precision)
        return NextToken(model, config.precision)
    # Imported here: both need the layers of a conversion, plain training does not.
    if kind == "distill":
        from fastweight.train.distill import Distill

        return Distill(model, config.objective, config.precision)
    from fastweight.train.transfer import Transfer

    return Transfer(model, config.objective, config.precision)
