"""What a learner is: weights in, weights out."""

from typing import ClassVar, Generic, Protocol, TypeVar

from fastweight.learn.scored import Scored
from fastweight.learn.weights import RowWeights, SharedWeights, Weights
from fastweight.model import Model

W = TypeVar("W", bound=Weights)


class Learner(Protocol, Generic[W]):
    """A rule that learns from what was scored. Frozen: all that it remembers is in the weights.

    kind: its name. chunk_size: targets that are scored before each step.
    """

    kind: ClassVar[str]

    @property
    def chunk_size(self) -> int: ...

    def learn(self, model: Model, weights: W, scored: Scored) -> W:
        """The weights for what comes after `scored`. Neither the model nor `weights` changes."""
        ...

    def learning_tokens(self, scored: Scored) -> int:
        """Tokens that `learn` reads again."""
        ...


class GlobalLearner(Learner[SharedWeights], Protocol):
    """Learns through all documents, one after the other."""

    def start(self, model: Model, num_targets: int) -> SharedWeights:
        """The weights before the first of `num_targets` targets."""
        ...


class DocumentLearner(Learner[RowWeights], Protocol):
    """Learns in each document for itself, and forgets at its end."""

    def start(self, model: Model) -> RowWeights:
        """The weights at the start of a document, one row."""
        ...
