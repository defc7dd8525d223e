"""What a checkpoint holds: a model folder, and all that the next step needs besides the weights. No pickles.

model.safetensors, config.json, tokenizer/: the model, readable by `fastweight.load`; a run that trains a part of the
model has trained.safetensors instead (partial.py). optimizer.safetensors: what the optimisers remember.
rng.safetensors: the random generators. trainer.json: the tally. averaged.safetensors: the averaged weights in
float32, if the run averages. carried-N.safetensors: the state of the N-th micro-batch when documents carry their memory
from step to step.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastweight import files
from fastweight.configs import to_json
from fastweight.data import Tokenizer
from fastweight.model import Model, load
from fastweight.state import ModelState, load_state
from fastweight.train.folders import CheckpointError
from fastweight.train.tally import Tally

AVERAGED = "averaged.safetensors"


class Resumed(NamedTuple):
    """What was read from a checkpoint besides the model."""

    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    tally: Tally
    carried: list[ModelState] | None
    averaged: dict[str, Tensor]


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write a model folder with the tokenizer inside."""
    model.save(folder)
    tokenizer.save(folder / "tokenizer")


def save_trainer(
    folder: Path, optimizer: Mapping[str, Tensor], tally: Tally, carried: list[ModelState] | None
) -> None:
    """Write everything but the model and averaged weights into the checkpoint `folder`.

    optimizer: what it remembers, whole.
    """
    _save_tensors(folder / "optimizer.safetensors", optimizer)
    save_file(random_state(), folder / "rng.safetensors")
    for i, state in enumerate(carried or []):
        state.save(folder / f"carried-{i}.safetensors")
    record = {"tally": tally.to_dict(), "carried": None if carried is None else len(carried)}
    files.write_text(folder / "trainer.json", to_json(record) + "\n")


def save_average(folder: Path, average: Mapping[str, Tensor]) -> None:
    """Write the averaged weights, whole, into the checkpoint `folder`."""
    _save_tensors(folder / AVERAGED, average)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def read_model(folder: Path) -> Model:
    """Read what `save_model` wrote into a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        return load(folder)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def read_trainer(folder: Path, device: torch.device) -> Resumed:
    """Read what `save_trainer` wrote. Raises CheckpointError if a part cannot be read."""
    try:
        record = json.loads((folder / "trainer.json").read_text())
        carried = record["carried"]
        if carried is not None:
            carried = [load_state(folder / f"carried-{i}.safetensors").to(device) for i in range(carried)]
        moments, rng = (load_file(folder / f"{part}.safetensors") for part in ("optimizer", "rng"))
        averaged = load_file(folder / AVERAGED) if (folder / AVERAGED).is_file() else {}
        return Resumed(moments, rng, Tally.from_dict(record["tally"]), carried, averaged)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} cannot be read: {error} Resume from another checkpoint.")


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned; generators of devices that are not here are left out."""
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)
