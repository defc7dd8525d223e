"""Micro-batches of each step, as a function of the step number alone."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fastweight import data
from fastweight.configs import require
from fastweight.data import Batch
from fastweight.data.batches import View
from fastweight.data.sampler import Sampler
from fastweight.distributed.mesh import share_of_batch
from fastweight.train.config import DataConfig


def training_stores(store: data.Store, config: DataConfig) -> list[data.Store]:
    """The store and those that are mixed in, in their order."""
    return [store, *(data.Store.open(path) for path in config.mix)]


def training_splits(store: data.Store, config: DataConfig) -> list[data.Split]:
    """The training split of each store, with its weights where the run uses some and the store has them.

    Raises ValueError if none has weights of that name.
    """
    stores = training_stores(store, config)
    names = [config.weights if has_weights(found, config) else "" for found in stores]
    if config.weights and not any(names):
        names[0] = config.weights  # the store says what it has
    return [found.split("train", weights=name) for found, name in zip(stores, names, strict=True)]


def has_weights(store: data.Store, config: DataConfig) -> bool:
    """Whether the store has the weights that the run uses."""
    return config.weights in store.manifest.get("weights", {})


def describe_contents(store: data.Store, config: DataConfig) -> Any:
    """What of the manifests says which tokens and weights a run reads: equal for equal data, wherever it lies."""
    if not (config.mix or config.weights):
        return store.manifest["splits"]
    return [
        {
            "splits": found.manifest["splits"],
            "weights": found.manifest["weights"][config.weights] if has_weights(found, config) else None,
        }
        for found in training_stores(store, config)
    ]


def make_view(splits: data.Split | Sequence[data.Split], config: DataConfig, seed: int) -> View:
    """The view that `config` names over one split, or over several mixed by their shares."""
    if isinstance(splits, data.Split):
        return _view_of(splits, config, seed)
    if len(splits) == 1:
        return _view_of(splits[0], config, seed)
    further = list(config.mix.values())
    return data.Mixture([_view_of(split, config, seed) for split in splits], [1 - sum(further), *further], seed)


def _view_of(split: data.Split, config: DataConfig, seed: int) -> View:
    """The view over one split; streams have a lane per sequence of a step."""
    if config.view == "windows":
        return data.Windows(split, config.seq_len)
    if config.view == "bins":
        return data.Bins(split, config.seq_len, config.align)
    if config.view == "long":
        return data.LongDocuments(split, config.seq_len, config.min_tokens or None)
    return data.Streams(split, config.seq_len, config.batch_size, seed)


def step_batches(
    splits: data.Split | Sequence[data.Split], config: DataConfig, seed: int, start_step: int, rank: int = 0,
    processes: int = 1,
) -> Iterator[list[Batch]]:  # fmt: skip
    """Yield the micro-batches of step start_step, start_step + 1, ... without end.

    splits: one, or those of `training_splits`. Process `rank` reads the rank-th of equal slices of the step's samples.
    The samples of a step depend neither on the micro-batch size nor on the number of processes.
    """
    view, share, rows = make_view(splits, config, seed), *shares(config, processes)
    sampler = None if view.ordered else Sampler(len(view), seed)
    for step in itertools.count(start_step):
        first = step * config.batch_size + rank * share
        pieces = [np.arange(start, start + rows) for start in range(first, first + share, rows)]
        yield [view.batch(piece if sampler is None else sampler.locate(piece)[1]) for piece in pieces]


def read_ahead(steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The same steps without end, each read by a thread while the one before it is computed, for a GPU.

    The thread puts them into page-locked memory where there is a GPU. What reading raises is raised at its step.
    """

    def read() -> list[Batch]:
        batches = next(steps)
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    with ThreadPoolExecutor(1, thread_name_prefix="reading") as thread:
        coming = thread.submit(read)
        while True:
            found = coming.result()
            coming = thread.submit(read)
            yield found


class Reader:
    """The micro-batches of any step for any slice; it costs nothing to go on with the next step of the same one.

    ahead: read a step while the one before it is computed.
    """

    def __init__(self, splits: Sequence[data.Split], config: DataConfig, seed: int, *, ahead: bool = False):
        self._given, self._ahead = (splits, config, seed), ahead
        self._at = (-1, 0, 0)
        self._steps: Iterator[list[Batch]] = iter(())

    def read(self, step: int, rank: int, size: int) -> list[Batch]:
        """The rank-th of `size` slices of a step."""
        if self._at != (step, rank, size):
            steps = step_batches(*self._given, step, rank, size)
            self._steps = read_ahead(steps) if self._ahead else steps
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
