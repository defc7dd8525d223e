"""Scoring pieces of documents: the only way to make a `Scored`, and so the only way to feed a learner."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastweight.learn.pieces import Piece
from fastweight.learn.weights import Weights
from fastweight.model import Model
from fastweight.state import ModelState

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32 logits at a time
_MADE_BY_SCORING = object()


@dataclass(frozen=True)
class Scored:
    """Targets whose score is settled, and all that may be learned from: made by `score_pieces`, by nothing else.

    pieces: what was read, each document cut after its last scored target, so that nothing unscored is in reach.
    nats: float64 [targets], −ln p of the scored targets, piece after piece.
    gradient: of Σ nats by the weights' tensors, taken in the same pass; None where it was not asked for.
    log_probs: [targets, V], the whole distribution behind each score; None where it was not asked for.
    """

    pieces: tuple[Piece, ...]
    nats: np.ndarray
    gradient: dict[str, Tensor] | None = None
    log_probs: Tensor | None = None
    _seal: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self._seal is not _MADE_BY_SCORING:
            raise TypeError("Scored is what score_pieces returns; score first, then learn from it.")

    @property
    def num_targets(self) -> int:
        return len(self.nats)

    @property
    def forwarded_tokens(self) -> int:
        """Tokens that the model read."""
        return sum(piece.num_inputs for piece in self.pieces)

    @property
    def document_ids(self) -> np.ndarray:
        """[targets], the number of each target's document."""
        return np.concatenate([np.full(p.num_targets, p.text.index) for p in self.pieces])

    @property
    def positions(self) -> np.ndarray:
        """[targets], the tokens before each target in its document."""
        return np.concatenate([np.arange(p.first, p.stop + 1) for p in self.pieces])

    @property
    def targets(self) -> Tensor:
        """[targets], the tokens that were scored."""
        return torch.cat([p.text.tokens[p.first : p.stop + 1] for p in self.pieces])

    @property
    def num_bytes(self) -> np.ndarray:
        """[targets], the UTF-8 bytes that each target stands for."""
        return np.concatenate([p.text.num_bytes[p.first : p.stop + 1] for p in self.pieces])

    def followed_by(self, other: "Scored") -> "Scored":
        """Both, scored with the same weights one after the other; gradients add up, distributions are dropped."""
        gradient = None
        if self.gradient is not None and other.gradient is not None:
            gradient = {name: g + other.gradient[name] for name, g in self.gradient.items()}
        nats = np.concatenate([self.nats, other.nats])
        return dataclasses.replace(
            self, pieces=self.pieces + other.pieces, nats=nats, gradient=gradient, log_probs=None
        )


def score_pieces(
    model: Model,
    weights: Weights | None,
    pieces: Sequence[Piece],
    state: ModelState | None = None,
    *,
    gradient: bool = False,
    keep_log_probs: bool = False,
) -> tuple[Scored, ModelState]:
    """Read pieces side by side and score their targets.

    weights: what the model is run with, None for its own. state: what the first pieces go on from, in their order;
    the others start from nothing. gradient: also differentiate the scores by the weights; `state` is a constant.
    Only scored positions go through the vocabulary. Losses are float32 (or the model's dtype, if wider), sums float64.
    Returns what was scored, and the state after the pieces, detached.
    """
    lengths = [piece.num_inputs for piece in pieces]
    used = weights.traced() if weights is not None and gradient else weights

    def read(running: Model) -> tuple[Tensor, Tensor | None, dict[str, Tensor] | None, ModelState]:
        features, after = _features(running, pieces, lengths, extend(running, state, len(pieces)))
        losses, log_probs = _losses(running, features, _targets(pieces).to(features.device), keep_log_probs)
        found = _gradient(losses.sum(), used.tensors) if used is not None and gradient else None
        return losses.detach(), log_probs, found, after

    with torch.set_grad_enabled(gradient):
        losses, log_probs, found, after = read(model) if used is None else used.run(model, lengths, read)
    cut = tuple(dataclasses.replace(piece, text=piece.text.until(piece.stop)) for piece in pieces)
    nats = losses.double().cpu().numpy()
    return Scored(cut, nats, found, log_probs, _MADE_BY_SCORING), after.detach()


def extend(model: Model, state: ModelState | None, num_sequences: int) -> ModelState:
    """The sequences of `state`, followed by fresh ones."""
    if state is None:
        return model.init_state(num_sequences)
    carried = state.num_sequences
    if carried == num_sequences:
        return state
    rows = [*range(carried), *[0] * (num_sequences - carried)]
    keep = torch.arange(num_sequences, device=model.device) < carried
    return state.select(rows).where(keep, model.init_state(num_sequences))


def piece_gradient(model: Model, weights: Weights, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The gradient of the mean loss of pieces that were scored before, each read again from nothing."""
    again, _ = score_pieces(model, weights, pieces, gradient=True)
    assert again.gradient is not None
    return {name: g / again.num_targets for name, g in again.gradient.items()}


def _targets(pieces: Sequence[Piece]) -> Tensor:
    return torch.cat([p.text.tokens[p.first : p.stop + 1] for p in pieces])


def _features(
    model: Model, pieces: Sequence[Piece], lengths: list[int], state: ModelState
) -> tuple[Tensor, ModelState]:
    """The features of the inputs whose targets are scored, [targets, D], and the state after all inputs."""
    inputs = torch.cat([p.text.tokens[p.start : p.stop] for p in pieces]).to(model.device)
    if len(set(lengths)) == 1:
        features, state = model.features(inputs.view(len(pieces), -1), state)
    else:
        ends = torch.tensor([0, *lengths]).cumsum(0).int()  # on the host: lengths decide on shapes
        features, state = model.features(inputs[None], state, ends)
    parts = features.flatten(0, 1).split(lengths)
    return torch.cat([f[p.first - p.start - 1 :] for f, p in zip(parts, pieces, strict=True)]), state


def _losses(model: Model, features: Tensor, targets: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Losses [targets] and, if kept, ln p [targets, V]; the logits exist for a bounded number of targets at a time."""

    def lose(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = model.logits(part)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        losses = -log_probs.gather(-1, wanted[:, None])[:, 0]
        return losses, log_probs.detach() if keep else None

    size = max(1, LOGITS_PER_CHUNK // model.config.vocab_size)
    parts = list(zip(features.split(size), targets.split(size), strict=True))
    again = len(parts) > 1 and torch.is_grad_enabled()
    found: list[Any] = [checkpoint(lose, *part, use_reentrant=False) if again else lose(*part) for part in parts]
    losses = torch.cat([losses for losses, _ in found])
    return losses, torch.cat([log_probs for _, log_probs in found]) if keep else None


def _gradient(loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for what these scores do not depend on, such as the rates of a memory whose chunk is unfinished."""
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    pairs = zip(tensors.items(), found, strict=True)
    return {name: torch.zeros_like(tensor) if g is None else g for (name, tensor), g in pairs}
