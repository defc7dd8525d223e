"""Micro-batches of each step, as a function of the step number alone."""

import dataclasses
from collections.abc import Iterator

from fastweight import data
from fastweight.data import Batch
from fastweight.data.batches import View
from fastweight.train.config import DataConfig


def make_view(split: data.Split, config: DataConfig, seed: int) -> View:
    """The view that `config` names over one split; streams have a lane per sequence of a step."""
    if config.view == "windows":
        return data.Windows(split, config.seq_len)
    if config.view == "bins":
        return data.Bins(split, config.seq_len)
    return data.Streams(split, config.seq_len, config.batch_size, seed)


def step_batches(split: data.Split, config: DataConfig, seed: int, start_step: int) -> Iterator[list[Batch]]:
    """Yield the micro-batches of step start_step, start_step + 1, ... without end.

    The samples of a step do not depend on the micro-batch size.
    """
    view = make_view(split, config, seed)
    pieces = config.batch_size // config.rows
    if view.lanes is not None:
        # A lane is a row of the whole batch: read the batch, then cut it.
        for batch in data.loader(view, config.batch_size, seed, start_step):
            yield [_rows(batch, i * config.rows, (i + 1) * config.rows) for i in range(pieces)]
    batches = data.loader(view, config.rows, seed, start_step * pieces)
    while True:
        yield [next(batches) for _ in range(pieces)]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    goes_on = None if batch.continues is None else batch.continues[start:stop]
    cut = {name: getattr(batch, name)[start:stop] for name in ("tokens", "targets", "target_bytes")}
    return dataclasses.replace(batch, **cut, continues=goes_on)
