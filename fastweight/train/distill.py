"""Logit distillation: the converted model learns to say what its own backbone says."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.data import IGNORED, Batch
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.train.config import ObjectiveConfig
from fastweight.train.lora import without_adapters
from fastweight.train.loss import autocast, split_pieces
from fastweight.train.teacher import teacher_view


class Distill:
    """(1 − alpha) · temperature² · KL(teacher ‖ student) + alpha · cross-entropy, summed over the targets asked for.

    The teacher is the same model as the untouched backbone: no linear branch, no in-place memory, no adapters. Both
    distributions exist for a bounded number of tokens at a time. Sums: cross-entropy, loss, KL, all in nats.
    """

    reads_text = True

    def __init__(self, model: Model, config: ObjectiveConfig, precision: str):
        self.model, self.config, self.precision = model, config, precision

    def totals(self, batches: Sequence[Batch]) -> list[float]:
        return []

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float] = ()
    ) -> tuple[Tensor, ModelState | None]:
        taught = self._teacher_features(batch)
        with autocast(batch.tokens.device, self.precision):
            features, after = self.model.features(batch.tokens, state, batch.cu_seqlens)
        leaf = features.detach().requires_grad_()
        sums = torch.zeros(3, device=leaf.device)
        for student, teacher, targets in self._pieces(leaf, taught, batch.targets):
            piece = self._losses(student, teacher, targets)
            (piece.loss / num_targets).backward()
            sums = sums + torch.stack(piece).detach()
        # Without a trained parameter on its way (a branch of weight 0) the loss is a constant.
        if features.requires_grad:
            features.backward(leaf.grad)
        return sums, after.detach()

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        taught = self._teacher_features(batch)
        with autocast(batch.tokens.device, self.precision):
            features, _ = self.model.features(batch.tokens, None, batch.cu_seqlens)
        pieces = self._pieces(features, taught, batch.targets)
        return torch.stack([torch.stack(self._losses(*piece)) for piece in pieces]).sum(0)

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        return {"loss": means[0], "kl_nats": means[1]}

    @torch.no_grad()
    def _teacher_features(self, batch: Batch) -> Tensor:
        device = batch.tokens.device
        with teacher_view(self.model), autocast(device, self.precision):
            return self.model.features(batch.tokens, None, batch.cu_seqlens)[0]

    def _pieces(self, features: Tensor, taught: Tensor, targets: Tensor) -> list[tuple[Tensor, ...]]:
        # Both models' logits, the student's gradient and two distributions live at once.
        return split_pieces(4 * self.model.config.vocab_size, features, taught, targets)

    def _losses(self, student: Tensor, teacher: Tensor, targets: Tensor) -> "Losses":
        """features [n, D] of both, targets [n] → sums over the targets that are not ignored."""
        config, device = self.config, student.device
        with autocast(device, self.precision):
            logits = self.model.logits(student)
            with torch.no_grad(), without_adapters(self.model.head):
                wanted = self.model.logits(teacher)
        logits, wanted = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (logits, wanted))
        nats = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
        asked = targets != IGNORED
        kl = divergence(wanted / config.temperature, logits / config.temperature)
        kl = kl.masked_fill(~asked, 0).sum()
        loss = (1 - config.alpha) * config.temperature**2 * kl + config.alpha * nats
        return Losses(nats, loss, kl)


class Losses(NamedTuple):
    """Sums in nats: cross-entropy, what is made smaller, KL."""

    nats: Tensor
    loss: Tensor
    kl: Tensor


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats of each row of logits [n, vocab_size] → [n]."""
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)
