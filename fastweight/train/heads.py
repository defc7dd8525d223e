"""Cross-entropy of every token that a model predicts, each target with its own weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import require
from fastweight.data import IGNORED, Batch, targets_ahead, weights_ahead
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.train.config import ObjectiveConfig
from fastweight.train.loss import autocast, score_batch, split_pieces


class Heads:
    """Σ c_i L_i / Σ c_i over the heads i, L_i being the mean loss over head i's own targets and c_i its weight.

    Where batches carry weights, L_i is Σ w · nats / Σ w. Each head runs and is differentiated before the next, so that
    the logits of one exist at a time. Held-out losses are those of the first head, without weights. Sums: cross-entropy
    of the first head without weights; Σ w · nats of each head; Σ w of each head.
    Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2; weights Lin et al. 2024, arXiv:2404.07965, eq. 4.
    """

    reads_text = True

    def __init__(self, model: Model, config: ObjectiveConfig, precision: str):
        self.model, self.precision, self.count = model, precision, model.config.tokens_ahead
        weights = config.head_weights or (1.0,) * self.count
        require(
            len(weights) == self.count,
            f"objective: head_weights has {len(weights)} number(s), the model predicts {self.count} token(s) at each "
            "position. Give one per head, or leave it out for equal ones.",
        )
        self.shares = [weight / sum(weights) for weight in weights]

    def totals(self, batches: Sequence[Batch]) -> list[float]:
        """Σ w of each head."""
        found = [torch.stack([_total(*lesson).double() for lesson in self._lessons(batch)]) for batch in batches]
        return torch.stack(found).sum(0).tolist()

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float]
    ) -> tuple[Tensor, ModelState | None]:
        with autocast(batch.tokens.device, self.precision):
            features, after = self.model.features(batch.tokens, state, batch.cu_seqlens)
        leaf = features.detach().requires_grad_()
        lessons = self._lessons(batch)
        text = torch.zeros((), device=leaf.device)
        nats = torch.zeros(self.count, device=leaf.device)
        for piece, *flat in split_pieces(self.model.config.vocab_size, leaf, *(z for pair in lessons for z in pair)):
            pairs = zip(flat[::2], flat[1::2], strict=True)
            found = [self._learn_head(i, piece, *pair, totals[i]) for i, pair in enumerate(pairs)]
            text, nats = text + found[0][0], nats + torch.stack([weighed for _, weighed in found])
        # Without a trained parameter on its way (a branch of weight 0) the loss is a constant.
        if features.requires_grad:
            features.backward(leaf.grad)
        weights = torch.stack([_total(*lesson) for lesson in lessons])
        return torch.cat([text[None], nats, weights.to(nats.dtype)]), after.detach()

    def _lessons(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Targets and their weights [B, T] for each head."""
        ones = torch.ones(batch.targets.shape, device=batch.targets.device)
        pairs = ((targets_ahead(batch, i), weights_ahead(batch, i)) for i in range(self.count))
        return [(targets, ones if weights is None else weights) for targets, weights in pairs]

    def _learn_head(
        self, head: int, features: Tensor, targets: Tensor, weights: Tensor, total: float
    ) -> tuple[Tensor, Tensor]:
        """Add one head's gradients over a piece of the batch; its summed loss without and with weights, detached."""
        with autocast(features.device, self.precision):
            logits = self.model.logits(features, head)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
            loss = _sum(weights.to(nats.dtype) * nats, targets)
        if self.shares[head]:
            (loss / (total / self.shares[head])).backward()
        return _sum(nats.detach(), targets), loss.detach()

    def score(self, batch: Batch) -> Tensor:
        return score_batch(self.model, batch, self.precision)[None]

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        """The loss, and that of each of several heads; None for a head that had no target."""
        nats, weights = means[: self.count], means[self.count :]
        losses = [a / b if b else None for a, b in zip(nats, weights, strict=True)]
        if not losses:
            return {}
        whole = sum(share * (loss or 0.0) for share, loss in zip(self.shares, losses, strict=True))
        each = {f"head_{i}_nats": loss for i, loss in enumerate(losses, 1)}
        return {"loss": whole} | (each if self.count > 1 else {})


def _total(targets: Tensor, weights: Tensor) -> Tensor:
    """Σ w over the targets that are asked for."""
    return torch.where(targets == IGNORED, 0, weights).sum(dtype=torch.float64)


def _sum(values: Tensor, targets: Tensor) -> Tensor:
    """The sum of values [T] whose target is not ignored.

    By the kernel, and so in the order, in which cross-entropy sums its own: weights of 1 then change no bit.
    """
    asked = torch.where(targets == IGNORED, IGNORED, 0)
    return F.nll_loss(-values[:, None], asked, reduction="sum", ignore_index=IGNORED)
