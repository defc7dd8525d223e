"""Micro-batches of each step, as a function of the step number alone."""

import itertools
from collections.abc import Iterator

import numpy as np

from fastweight import data
from fastweight.configs import require
from fastweight.data import Batch
from fastweight.data.batches import View
from fastweight.data.sampler import Sampler
from fastweight.distributed.mesh import share_of_batch
from fastweight.train.config import DataConfig


def make_view(split: data.Split, config: DataConfig, seed: int) -> View:
    """The view that `config` names over one split; streams have a lane per sequence of a step."""
    if config.view == "windows":
        return data.Windows(split, config.seq_len)
    if config.view == "bins":
        return data.Bins(split, config.seq_len, config.align)
    if config.view == "long":
        return data.LongDocuments(split, config.seq_len, config.min_tokens or None)
    return data.Streams(split, config.seq_len, config.batch_size, seed)


def step_batches(
    split: data.Split, config: DataConfig, seed: int, start_step: int, rank: int = 0, processes: int = 1
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of step start_step, start_step + 1, ... without end.

    Process `rank` reads the rank-th of equal slices of the step's samples. The samples of a step depend neither on the
    micro-batch size nor on the number of processes.
    """
    view, share, rows = make_view(split, config, seed), *shares(config, processes)
    sampler = None if view.ordered else Sampler(len(view), seed)
    for step in itertools.count(start_step):
        first = step * config.batch_size + rank * share
        pieces = [np.arange(start, start + rows) for start in range(first, first + share, rows)]
        yield [view.batch(piece if sampler is None else sampler.locate(piece)[1]) for piece in pieces]


class Reader:
    """The micro-batches of any step for any slice; it costs nothing to go on with the next step of the same one."""

    def __init__(self, split: data.Split, config: DataConfig, seed: int):
        self._given = split, config, seed
        self._at = (-1, 0, 0)
        self._steps: Iterator[list[Batch]] = iter(())

    def read(self, step: int, rank: int, size: int) -> list[Batch]:
        """The rank-th of `size` slices of a step."""
        if self._at != (step, rank, size):
            self._steps = step_batches(*self._given, step, rank, size)
        self._at = (step + 1, rank, size)
        return next(self._steps)


def shares(config: DataConfig, processes: int) -> tuple[int, int]:
    """Sequences per step and per forward pass of each of so many processes. Raises ValueError if they do not fit."""
    share = share_of_batch(config.batch_size, processes)
    rows = min(config.rows, share)
    require(
        share % rows == 0,
        f"data: each of {processes} processes reads {share} sequences of a step, which micro_batch_size {rows} does "
        "not divide. Set another data.micro_batch_size.",
    )
    return share, rows
