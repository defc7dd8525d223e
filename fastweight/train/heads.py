"""Cross-entropy of every token that a model predicts, at each position the next and those after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.data import IGNORED, Batch, targets_ahead
from fastweight.model import Model
from fastweight.state import ModelState
from fastweight.train.config import ObjectiveConfig
from fastweight.train.loss import autocast, score_batch, split_pieces, total_nats


class Heads:
    """Σ c_i L_i / Σ c_i over the heads i, L_i being the mean loss over head i's own targets and c_i its weight.

    Each head runs and is differentiated before the next, so that the logits of one exist at a time. Held-out losses are
    those of the first head. Sums: cross-entropy of the first head; that of each head; the targets of each head.
    Source: Gloeckle et al. 2024, arXiv:2404.19737, section 2.
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
        """The targets of each head."""
        heads = [[targets_ahead(batch, i) != IGNORED for batch in batches] for i in range(self.count)]
        return [float(sum(int(asked.sum()) for asked in masks)) for masks in heads]

    def learn(
        self, batch: Batch, state: ModelState | None, num_targets: int, totals: Sequence[float]
    ) -> tuple[Tensor, ModelState | None]:
        with autocast(batch.tokens.device, self.precision):
            features, after = self.model.features(batch.tokens, state, batch.cu_seqlens)
        leaf = features.detach().requires_grad_()
        targets = [targets_ahead(batch, i) for i in range(self.count)]
        nats = torch.zeros(self.count, device=leaf.device)
        for piece, *wanted in split_pieces(self.model.config.vocab_size, leaf, *targets):
            nats = nats + torch.stack([self._learn_head(i, piece, wanted[i], totals[i]) for i in range(self.count)])
        # Without a trained parameter on its way (a branch of weight 0) the loss is a constant.
        if features.requires_grad:
            features.backward(leaf.grad)
        asked = torch.stack([(wanted != IGNORED).sum() for wanted in targets])
        return torch.cat([nats[:1], nats, asked.to(nats.dtype)]), after.detach()

    def _learn_head(self, head: int, features: Tensor, targets: Tensor, total: float) -> Tensor:
        """Add one head's gradients over a piece of the batch; its summed loss, detached."""
        with autocast(features.device, self.precision):
            loss = total_nats(self.model, features, targets, head)
        if self.shares[head]:
            (loss / (total / self.shares[head])).backward()
        return loss.detach()

    def score(self, batch: Batch) -> Tensor:
        return score_batch(self.model, batch, self.precision)[None]

    def describe(self, means: Sequence[float]) -> dict[str, Any]:
        """The loss, and that of each head; None for a head that had no target."""
        nats, asked = means[: self.count], means[self.count :]
        losses = [a / b if b else None for a, b in zip(nats, asked, strict=True)]
        if not losses:
            return {}
        whole = sum(share * (loss or 0.0) for share, loss in zip(self.shares, losses, strict=True))
        return {"loss": whole, **{f"head_{i}_nats": loss for i, loss in enumerate(losses, 1)}}
