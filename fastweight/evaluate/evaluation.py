"""What an evaluation finds, and the sums that it is made of."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastweight.evaluate.positions import PositionBucket, PositionSums
from fastweight.evaluate.reading import Reader
from fastweight.learn import Piece, Scored, Weights
from fastweight.model import Model
from fastweight.state import ModelState

Progress = Callable[[int, int], None]
Watch = Callable[[Weights | None, Scored], None]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Sums over all scored targets. nats: sum of −ln p over `tokens` targets that stand for `bytes` UTF-8 bytes.

    documents: documents with at least one target. forwarded_tokens: tokens the model read, context read again and what
    a learner read included. positions: the same sums by the number of tokens that stand before the target in its
    document. lengths: the same sums by the number of targets of the document. learning: the settings of what learned,
    None without. faults: inner updates that were not finite and were skipped, one sentence each.
    """

    context: str
    memory: str
    seq_len: int
    stride: int
    nats: float
    tokens: int
    bytes: int
    documents: int
    forwarded_tokens: int
    seconds: float
    positions: tuple[PositionBucket, ...]
    lengths: tuple[PositionBucket, ...]
    learning: dict[str, Any] | None = None
    faults: tuple[str, ...] = ()

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte: nats / (ln 2 · bytes)."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def forwarded_per_token(self) -> float:
        """Tokens that the model read per scored target."""
        return self.forwarded_tokens / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, derived figures included (None where a share has no targets)."""
        rows = {"positions": loss_by_position(self), "lengths": [bucket.to_dict() for bucket in self.lengths]}
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in rows}
        names = ("bits_per_byte", "nats_per_token", "forwarded_per_token")
        derived = {name: getattr(self, name) if self.bytes else None for name in names}
        return data | derived | {"faults": list(self.faults)} | rows

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Evaluation":
        """Undo `to_dict`, also after a way through JSON."""
        kept: dict[str, Any] = {name: data[name] for name in Evaluation.__dataclass_fields__}
        for name in ("positions", "lengths"):
            kept[name] = tuple(PositionBucket.from_dict(row) for row in data[name])
        kept["faults"] = tuple(data["faults"])
        return Evaluation(**kept)


def loss_by_position(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row per bucket of positions that holds a target: its bounds, counts, nats per token and bits per byte."""
    return [bucket.to_dict() for bucket in evaluation.positions]


@dataclass
class Tally:
    """Sums over the scored pieces, while they come in.

    watch: shown the weights and what they scored, before anything is learned from it. keep_log_probs: with the whole
    distributions. learner: the kind of what learns, for messages.
    """

    sums: PositionSums
    reader: Reader
    progress: Progress | None = None
    watch: Watch | None = None
    keep_log_probs: bool = False
    learner: str = ""
    lengths: PositionSums = field(default_factory=PositionSums)
    forwarded_tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, pieces: Sequence[Piece], weights: Weights | None, scored: Scored) -> None:
        """Count what was scored; `pieces` with their whole documents."""
        self.forwarded_tokens += scored.forwarded_tokens
        self._check_finite(scored)
        self.sums.add(scored.positions, scored.nats, scored.num_bytes)
        lengths = np.repeat([p.text.num_targets for p in pieces], [p.num_targets for p in pieces])
        self.lengths.add(lengths, scored.nats, scored.num_bytes)
        if self.watch is not None:
            self.watch(weights, scored)
        if self.progress is not None:
            self.progress(self.sums.tokens, self.reader.total)

    def add_faults(self, model: Model, state: ModelState, pieces: Sequence[Piece]) -> None:
        """Name the faults in the rows of `state`, which have read `pieces`."""
        if not model.describe_faults(state):
            return
        for row, piece in enumerate(pieces):
            lines = model.describe_faults(state.select([row]))
            self.faults += [f"document {piece.text.index}: {line.replace(' of sequence 0', '')}" for line in lines]

    def _check_finite(self, scored: Scored) -> None:
        if np.isfinite(scored.nats).all():
            return
        bad = int(np.flatnonzero(~np.isfinite(scored.nats))[0])
        where = f"document {scored.document_ids[bad]}: the loss of token {scored.positions[bad]} is not finite."
        if self.learner:
            raise ValueError(f"{where} The model diverged while it learned ({self.learner}); lower the rate.")
        raise ValueError(f"{where} The model has diverged; its faults: {self.faults or 'none reported'}.")
