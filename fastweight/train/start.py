"""What a run begins with: a new model, a given one, or that of a checkpoint; and its place on device and processes."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastweight.configs import require
from fastweight.data import Store
from fastweight.distributed.copies import read_sharded_model, sharded_model
from fastweight.distributed.team import Team
from fastweight.model import Model, load, load_config
from fastweight.train import checkpoint, folders, partial
from fastweight.train.config import TrainConfig


class Start(NamedTuple):
    """model: with its weights in the leader; in other processes they may be missing (device "meta").

    checkpoint: where the run goes on, None for a new one. reads: each process reads its own weights from there.
    """

    model: Model
    checkpoint: Path | None = None
    reads: bool = False


def new_start(config: TrainConfig, store: Store, model: Model | None, team: Team) -> Start:
    """A new run with `model`, or the one that `config` names; new weights are drawn by the leader alone."""
    if model is not None:
        return Start(model)
    source = config.model
    if source.folder:
        return Start(load(source.folder) if team.leads else _empty(Path(source.folder)))
    require(bool(source.preset), "model: name a preset (model.preset) or a model folder (model.folder).")
    vocab_size = source.vocab_size or store.tokenizer.vocab_size
    with contextlib.nullcontext() if team.leads else torch.device("meta"):
        return Start(Model.from_preset(source.preset, **(source.changes | {"vocab_size": vocab_size})))


def resumed_start(config: TrainConfig, out: Path, record: dict[str, Any], resume: bool | str, team: Team) -> Start:
    """The run in `out` from its latest checkpoint, or the one that `resume` names. The leader compares it with its
    manifest. Raises CheckpointError if it is damaged."""
    folder = folders.open_checkpoint(out, resume if isinstance(resume, str) else None, verify=team.leads)
    if config.partial:
        base = out / partial.BASE
        return Start(partial.read_base(out, record["base"]) if team.leads else _empty(base), folder)
    if team.size == 1:
        return Start(checkpoint.read_model(folder), folder)
    return Start(checkpoint.empty_model(folder), folder, reads=True)


def placed(start: Start, team: Team, device: torch.device) -> Model:
    """The model with its weights, on the device; cut, if there are several processes (`start.model` then stays)."""
    if team.size == 1:
        return start.model.to(device)
    if not start.reads:
        return sharded_model(start.model, team, device)
    assert start.checkpoint is not None
    with checkpoint.open_tensors(start.checkpoint) as tensors:
        return read_sharded_model(start.model, tensors.under("model"), team, device)


def _empty(folder: Path) -> Model:
    with torch.device("meta"):
        return Model(load_config(folder))
