"""Gradient descent on all parameters, chunk of the text after chunk."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.learn.pieces import Piece, batches
from fastweight.learn.scored import Scored, piece_gradient
from fastweight.learn.weights import SharedWeights
from fastweight.model import Model

MOMENTUM = "momentum: "
SEEN, TOTAL = "targets learned from", "targets in all"


@dataclass(frozen=True, kw_only=True)
class GlobalSgd:
    """SGD with momentum over chunks of at least `chunk_size` targets, all parameters, through all documents.

    lr: rate at the start; it falls to 0 on a cosine over all targets. momentum: 0.9 as in the published records.
    clip: largest norm of the gradient. epochs: passes over each chunk, in sequences of at most seq_len targets that
    are read from nothing, batch_size of them per step.
    A chunk that was scored with its gradient is learned from in one step and not read again: epochs must be 1.
    """

    kind: ClassVar[str] = "sgd"
    chunk_size: int = 32768
    lr: float = 2e-3
    momentum: float = 0.9
    clip: float = 1.0
    epochs: int = 1
    seq_len: int = 2048
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("chunk_size", "epochs", "seq_len", "batch_size"):
            require(getattr(self, name) >= 1, f"sgd: {name} must be at least 1, got {getattr(self, name)}.")
        good = math.isfinite(self.lr) and self.lr >= 0
        require(good, f"sgd: lr must be finite and not negative, got {self.lr}.")
        require(0 <= self.momentum < 1, f"sgd: momentum must lie in [0, 1), got {self.momentum}.")
        require(self.clip > 0, f"sgd: clip must be positive, got {self.clip}.")

    def start(self, model: Model, num_targets: int) -> SharedWeights:
        """The model's floating-point parameters, without momentum."""
        tensors = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
        momenta = {MOMENTUM + name: torch.zeros_like(t) for name, t in tensors.items()}
        counts = {SEEN: torch.tensor(0), TOTAL: torch.tensor(num_targets)}
        return SharedWeights(tensors, momenta | counts)

    def learn(self, model: Model, weights: SharedWeights, scored: Scored) -> SharedWeights:
        if scored.gradient is not None:
            self.check_single_epoch()
            gradient = {name: g / scored.num_targets for name, g in scored.gradient.items()}
            weights = self._step(weights, gradient)
        else:
            for _ in range(self.epochs):
                for pieces in batches(sequences(scored, self.seq_len), self.batch_size):
                    weights = self._step(weights, piece_gradient(model, weights, pieces))
        seen = {SEEN: weights.memory[SEEN] + scored.num_targets}
        return SharedWeights(weights.tensors, weights.memory | seen)

    def check_single_epoch(self) -> None:
        """Refuse epochs that a chunk with its gradient, read once, cannot give."""
        needs = "Use one epoch, or mode exact, which reads it again."
        require(self.epochs == 1, f"sgd: a chunk that is read once gives one step, got {self.epochs} epochs. {needs}")

    def learning_tokens(self, scored: Scored) -> int:
        return 0 if scored.gradient is not None else self.epochs * scored.num_targets

    def _step(self, weights: SharedWeights, gradient: dict[str, Tensor]) -> SharedWeights:
        done = int(weights.memory[SEEN]) / int(weights.memory[TOTAL])
        rate = self.lr * (1 + math.cos(math.pi * done)) / 2
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        factor = torch.clamp(self.clip / norm.clamp(min=1e-12), max=1.0)
        memory, tensors = dict(weights.memory), {}
        for name, tensor in weights.tensors.items():
            momentum = self.momentum * memory[MOMENTUM + name] + factor * gradient[name]
            memory[MOMENTUM + name], tensors[name] = momentum, tensor - rate * momentum
        return SharedWeights(tensors, memory)


def sequences(scored: Scored, seq_len: int) -> Iterator[Piece]:
    """What was scored, cut into sequences of at most seq_len targets that do not overlap."""
    for _, group in groupby(scored.pieces, lambda piece: piece.text.index):
        held = list(group)
        text = held[-1].text
        for start in range(held[0].first - 1, text.num_targets, seq_len):
            yield Piece(text, start, min(start + seq_len, text.num_targets), start + 1)
