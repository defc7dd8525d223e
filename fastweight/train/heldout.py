"""The loss on held-out windows while a run goes on."""

import numpy as np

from fastweight.data import Split, Windows
from fastweight.model import Model
from fastweight.train.config import TrainConfig
from fastweight.train.loss import score_batch
from fastweight.train.tally import NATS_PER_BIT


def heldout_loss(model: Model, split: Split, config: TrainConfig) -> tuple[float, float]:
    """(nats per target, bits per byte) over the first windows of `split`, each read from its own start.

    As many whole windows of data.seq_len as fit log.heldout_tokens, at least one. Sums in float64.
    """
    view = Windows(split, config.data.seq_len)
    num_windows = min(len(view), max(1, config.log.heldout_tokens // config.data.seq_len))
    nats, targets, num_bytes = 0.0, 0, 0
    for first in range(0, num_windows, config.data.rows):
        batch = view.batch(np.arange(first, min(first + config.data.rows, num_windows)))
        targets, num_bytes = targets + batch.num_targets, num_bytes + batch.num_bytes
        nats += score_batch(model, batch.to(model.device), config.precision).item()
    return nats / targets, nats / NATS_PER_BIT / num_bytes
