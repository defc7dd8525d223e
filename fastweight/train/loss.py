"""Forward and backward of one micro-batch, without ever holding the logits of the whole batch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.data import IGNORED, Batch
from fastweight.model import Model
from fastweight.state import ModelState

# 2^26 float32 logits are 256 MB.
MAX_LOGITS = 1 << 26


class Counts(NamedTuple):
    """Targets asked for, and their UTF-8 bytes."""

    targets: int
    bytes: int


def count(batches: list[Batch]) -> Counts:
    """Counts over all micro-batches of a step; taken before they move to the device."""
    return Counts(sum(batch.num_targets for batch in batches), sum(batch.num_bytes for batch in batches))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast for precision "bfloat16", nothing for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def total_nats(model: Model, features: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) over targets that are not ignored, in float32 or wider. features: [T, D]; targets: [T]."""
    logits = model.logits(features)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


def split_pieces(width: int, features: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut features [B, T, D] and what goes with them [B, T, ...] into pieces [n, ...] with n · width <= MAX_LOGITS."""
    rows = max(1, MAX_LOGITS // width)
    return list(zip(*(z.flatten(0, 1).split(rows) for z in (features, *others)), strict=True))


def train_on(
    model: Model, batch: Batch, state: ModelState | None, num_targets: int, precision: str
) -> tuple[Tensor, ModelState]:
    """Add the gradients of this micro-batch to the parameters.

    num_targets: targets of the whole step, so that the step's gradient is that of the mean over all its targets.
    precision: "bfloat16" runs the forward pass under autocast. The head runs and is differentiated in pieces of the
    sequence, before the blocks. Returns the summed loss in nats and the state after the batch, both detached.
    """
    with autocast(batch.tokens.device, precision):
        features, after = model.features(batch.tokens, state, batch.cu_seqlens)
    leaf = features.detach().requires_grad_()
    nats = torch.zeros((), device=leaf.device)
    for piece, targets in split_pieces(model.config.vocab_size, leaf, batch.targets):
        with autocast(leaf.device, precision):
            loss = total_nats(model, piece, targets)
        (loss / num_targets).backward()
        nats = nats + loss.detach()
    # Without a trained parameter on its way (a branch of weight 0) the loss is a constant.
    if features.requires_grad:
        features.backward(leaf.grad)
    return nats, after.detach()


@torch.no_grad()
def score_batch(model: Model, batch: Batch, precision: str) -> Tensor:
    """Summed loss of a batch in nats, each row from its own start."""
    with autocast(batch.tokens.device, precision):
        features, _ = model.features(batch.tokens, None, batch.cu_seqlens)
        pieces = split_pieces(model.config.vocab_size, features, batch.targets)
        parts = [total_nats(model, piece, targets) for piece, targets in pieces]
    return torch.stack(parts).sum()
