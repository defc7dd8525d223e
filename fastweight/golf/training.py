"""The stages on the training clock: the training run, and the Hessian pass over training text."""

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from fastweight import files, ranks
from fastweight.artifact import Hessians, collect_hessians
from fastweight.data import Batch, Store, Windows, loader
from fastweight.devices import pick_device
from fastweight.golf.clock import Clock
from fastweight.golf.folder import RunFolder, file_digest, model_digest, read_json
from fastweight.golf.settings import CalibrationSettings, RunSettings
from fastweight.model import Model, load
from fastweight.train import TrainConfig, load_run_config, train
from fastweight.train.ending import RESULT
from fastweight.train.run import check_first_store, check_same_run

TRAINING, CALIBRATION = "training", "calibration"


def train_within(
    folder: RunFolder, config: TrainConfig, variant: str, calibration: CalibrationSettings, *,
    model: Model | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train by `config`, or go on with what `folder` holds; returns the record of the training.

    config.max_seconds is the budget of training and calibration together, 0 for none: then the steps end the run.
    model: train this one in place of config.model. The record's "stopped" names the signal that ended the run early,
    else it is "" or "time".
    Raises ValueError if the folder holds a run with other settings.
    """
    settings = RunSettings(variant=variant, budget_seconds=config.max_seconds, calibration=calibration)
    folder.start(settings)
    config = dataclasses.replace(config, max_seconds=settings.train_seconds)
    begun = (folder.train / "latest").is_file()
    if begun:
        check_same_run(config, folder.train)
    if not (folder.train / RESULT).is_file():
        result = train(config, folder.train, resume=begun, model=None if begun else model, quiet=quiet)
        if result.stopped not in ("", "time"):
            return {"stopped": result.stopped}
    return training_record(folder)


def training_record(folder: RunFolder) -> dict[str, Any]:
    """What the training run ended with. Raises ValueError if it has not ended."""
    file = folder.train / RESULT
    if not file.is_file():
        return {"stopped": "unfinished"}
    result = read_json(file)
    kept = ("step", "tokens", "seconds", "tokens_per_second", "bad_steps", "parameters", "initial_share", "stopped")
    return {name: result[name] for name in kept}


def open_store(folder: RunFolder, place: str = "") -> Store:
    """The token store of a run, at `place` if it has moved. Raises ValueError if it holds other data."""
    config = load_run_config(folder.train)
    found = Store.open(place or config.data.store)
    check_first_store(folder.train, found, config)
    return found


def calibrate(folder: RunFolder, store: str = "") -> dict[str, Any] | None:
    """Collect the Hessians of the final model, over all ranks, or take those that are there; None if not asked for.

    store: where the token store is now, if it has moved. Batches follow those of the training. The clock goes on from
    the training's; on a budget, reading stops `margin` seconds before it is used up, on all ranks alike, after one
    batch at least.
    """
    settings, config = folder.settings(), load_run_config(folder.train)
    if settings.calibration.tokens == 0:
        return None
    trained = training_record(folder)
    made_from = {"model": model_digest(folder.final_model), "tokens": settings.calibration.tokens}
    found = folder.finished(CALIBRATION, made_from)
    kept = found is not None and folder.hessians.is_file() and file_digest(folder.hessians) == found["sha256"]
    if ranks.gather("calibration", kept)[0]:
        return folder.record(CALIBRATION)
    spent, calibration = trained["seconds"], settings.calibration
    clock = Clock(settings.budget_seconds, spent=spent, margin=calibration.margin)
    model = load(folder.final_model, pick_device(config.device)).eval()
    batches = _Until(_rounds(open_store(folder, store), config, calibration.tokens, trained["step"]), clock)
    hessians = collect_hessians(model, batches)
    tokens = sum(ranks.gather("calibration tokens", batches.tokens))
    with ranks.together("writing the Hessians"):
        if ranks.rank() == 0:
            write_hessians(folder.hessians, hessians)
            seconds = clock.seconds - spent
            values = {"tokens": tokens, "seconds": seconds, "ranks": ranks.num_ranks(), "cut_short": batches.was_cut}
            folder.finish(CALIBRATION, made_from, values | {"sha256": file_digest(folder.hessians)})
    return folder.record(CALIBRATION)


def write_hessians(path: Path, hessians: Hessians) -> None:
    """Store in float32: half of the space, and far finer than the damping."""
    narrow = {name: value.float().cpu().contiguous() for name, value in hessians.items()}
    files.write_atomically(path, lambda temporary: save_file(narrow, temporary))


def read_hessians(path: Path) -> Hessians:
    """What `write_hessians` wrote."""
    return {name: value.double() for name, value in load_file(path).items()}


class _Until:
    """Yields this rank's batch of each round until there is none or the clock is over, on all ranks alike."""

    def __init__(self, rounds: Iterator[Batch | None], clock: Clock):
        self.rounds, self.clock = rounds, clock
        self.tokens, self.was_cut = 0, False

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.rounds):
            if number and ranks.any_rank("calibration clock", self.clock.is_over):
                self.was_cut = True
                return
            if batch is not None:
                self.tokens += batch.tokens.numel()
                yield batch


def _rounds(store: Store, config: TrainConfig, tokens: int, step: int) -> Iterator[Batch | None]:
    """This rank's batch of training text in each round, None where the last round has none for it."""
    data, ours, count = config.data, ranks.rank(), ranks.num_ranks()
    view = Windows(store.split("train"), data.seq_len)
    rows = min(data.rows, len(view))
    wanted = min(max(1, round(tokens / (rows * data.seq_len))), len(view) // rows)
    batches = islice(loader(view, rows, config.seed, step * data.batch_size // rows), wanted)
    for _ in range(0, wanted, count):
        batch = None
        for number, found in enumerate(islice(batches, count)):
            batch = found if number == ours else batch
        yield batch
