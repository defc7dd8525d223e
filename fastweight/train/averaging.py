"""The averaged weights of a run: of what, and how they become its result."""

import torch

from fastweight.configs import require
from fastweight.model import Model
from fastweight.optim import WeightAverage
from fastweight.train.config import TrainConfig

# The folder of the last weights beside that of the averaged ones.
RAW = "raw"
LARGE_SHARE = 1e-3


def make_average(model: Model, config: TrainConfig) -> WeightAverage | None:
    """The average of the trained weights of `model` as they are now; None if the run averages nothing."""
    if config.averaging.kind == "none":
        return None
    return WeightAverage(config.averaging, {name: p for name, p in model.named_parameters() if p.requires_grad})


@torch.no_grad()
def put_average(model: Model, average: WeightAverage) -> None:
    """Copy the averaged weights into `model`, in its dtype. Raises ValueError if nothing was averaged."""
    config = average.config
    require(
        average.count > 0,
        f"averaging: the run ended before the first weights were averaged (kind {config.kind}, start_factor "
        f"{config.start_factor:g}, every {config.every}); out/{RAW} holds the last. Train longer or average sooner.",
    )
    for name, value in average.averages().items():
        model.get_parameter(name).copy_(value)


def describe_average(average: WeightAverage) -> str:
    """What was averaged, in one line; with a warning if the initial weights have a share that can be felt."""
    share = average.initial_share
    line = f"averaged: {average.count} sets of weights ({average.config.kind}), share of the initial ones {share:.2g}"
    return (
        line
        if share <= LARGE_SHARE
        else f"{line}; warning: more than {LARGE_SHARE:g}: train longer or lower averaging.decay"
    )
