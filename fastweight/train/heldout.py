"""The loss on held-out windows while a run goes on."""

from typing import Any

import numpy as np
import torch

from fastweight.data import Split, Windows
from fastweight.distributed.shards import reshard
from fastweight.distributed.team import Team
from fastweight.model import Model
from fastweight.train.config import TrainConfig
from fastweight.train.objectives import Objective
from fastweight.train.tally import NATS_PER_BIT


def heldout_losses(
    model: Model, objective: Objective, split: Split, config: TrainConfig, team: Team | None = None
) -> dict[str, Any]:
    """loss_nats per target, bits_per_byte, and what else the objective measures, over the first windows of `split`.

    As many whole windows of data.seq_len as fit log.heldout_tokens, at least one, each read from its own start and
    without dropout. The processes of a team share the windows. Sums in float64.
    """
    team = team or Team()
    view = Windows(split, config.data.seq_len)
    num_windows = min(len(view), max(1, config.log.heldout_tokens // config.data.seq_len))
    starts = range(0, num_windows, config.data.rows)
    sums, targets, num_bytes = torch.zeros((), dtype=torch.float64), 0, 0
    training = model.training
    model.eval()
    try:
        for turn in range(0, len(starts), team.readers):
            # All processes compute every time, as each holds a part of the weights; the last turn may have too few.
            mine = turn + team.reader
            first = starts[mine if mine < len(starts) else 0]
            part = team.context.cut(view.batch(np.arange(first, min(first + config.data.rows, num_windows))))
            batch = part.batch
            with team.context.reading(model, part):
                scored = objective.score(batch.to(model.device)).cpu().double()
            if mine < len(starts):
                targets, num_bytes = targets + batch.num_targets, num_bytes + batch.num_bytes
                sums = sums + scored
            else:
                sums = sums + torch.zeros_like(scored)
    finally:
        model.train(training)
        reshard(model)
    nats, *parts = team.add(sums).tolist()
    targets, num_bytes = team.sum([targets, num_bytes])
    own = objective.describe([part / targets for part in parts])
    return {"loss_nats": nats / targets, "bits_per_byte": nats / NATS_PER_BIT / num_bytes, **own}
