"""What a checkpoint holds: a model folder, and all that the next step needs besides the weights. No pickles.

model.safetensors, config.json, tokenizer/: the model, readable by `fastweight.load`; a run that trains a part of the
model has trained.safetensors instead (partial.py). optimizer.safetensors: what the optimisers remember.
rng.safetensors: the random generators. trainer.json: the tally. averaged.safetensors: the averaged weights in
float32, if the run averages. outer.safetensors: what replica groups agree on that train alone for a while.
carried-N.safetensors: the state of the N-th micro-batch when documents carry their memory from step to step.

Several processes write part-R-of-N.safetensors each, with their rows of weights, moments and averages, in place of
those files; see fastweight.distributed.parts. Either kind can be resumed by any number of processes.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastweight import files
from fastweight.configs import to_json
from fastweight.data import Tokenizer
from fastweight.distributed.parts import Parts, open_parts
from fastweight.model import Model, check_weights, load, load_config
from fastweight.model_folder import read_origin, write_settings
from fastweight.optim import Optimizer
from fastweight.state import ModelState, load_state
from fastweight.train import folders
from fastweight.train.folders import CheckpointError
from fastweight.train.tally import Tally

AVERAGED, OUTER = "averaged.safetensors", "outer.safetensors"


class Resumed(NamedTuple):
    """What was read from the checkpoint `folder` besides tensors of the size of the model."""

    folder: Path
    rng: dict[str, Tensor]
    tally: Tally
    carried: list[ModelState] | None


def save_model(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write a model folder with the tokenizer inside."""
    model.save(folder)
    tokenizer.save(folder / "tokenizer")


def save_trainer(folder: Path, optimizer: Optimizer | None, tally: Tally, carried: list[ModelState] | None) -> None:
    """Write everything but the model and averaged weights into the checkpoint `folder`.

    optimizer: None where several processes write what it remembers.
    """
    if optimizer is not None:
        save_tensors(folder / "optimizer.safetensors", optimizer.state_tensors())
    save_file(random_state(), folder / "rng.safetensors")
    for i, state in enumerate(carried or []):
        state.save(folder / f"carried-{i}.safetensors")
    record = {"tally": tally.to_dict(), "carried": None if carried is None else len(carried)}
    files.write_text(folder / "trainer.json", to_json(record) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a file of a checkpoint."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def read_model(folder: Path) -> Model:
    """The model of a checkpoint that one process wrote, or several. Raises CheckpointError if it cannot be read."""
    try:
        if not part_paths(folder):
            return load(folder)
        model = empty_model(folder)
        with open_tensors(folder) as parts:
            own = parts.under("model")
            weights = {name: own.whole(name) for name in own.names()}
        check_weights(str(folder), weights, {name: tuple(t.shape) for name, t in model.state_dict().items()})
        for name, tensor in weights.items():
            # A parameter on device "meta" takes no data: it is replaced.
            owner, _, own = name.rpartition(".")
            old = model.get_parameter(name)
            setattr(model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=old.requires_grad))
        return model
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the model of a checkpoint, whoever wrote it, as a plain model folder `out` with its tokenizer.

    Raises CheckpointError if it cannot be read, or holds a part of a model alone (the run trains no more than that).
    """
    checkpoint, out = Path(checkpoint), Path(out)
    model = read_model(checkpoint)

    def write(folder: Path) -> None:
        model.save(folder)
        shutil.copytree(checkpoint / "tokenizer", folder / "tokenizer")

    folders.replace_folder(out, write)
    return out


def save_config(folder: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write what a model folder holds besides the weights."""
    write_settings(folder, model.config, model.origin)
    tokenizer.save(folder / "tokenizer")


def empty_model(folder: Path) -> Model:
    """The model of a checkpoint without its weights: on device "meta"."""
    try:
        with torch.device("meta"):
            model = Model(load_config(folder))
        model.origin = read_origin(folder)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    return model


def part_paths(folder: Path) -> list[Path]:
    """The files of several processes in a checkpoint; none if one process wrote it."""
    return sorted(folder.glob("part-*-of-*.safetensors"))


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[Parts]:
    """The large tensors of a checkpoint: "model:NAME", "trained:NAME", "optimizer:NAME|QUANTITY", "averaged:NAME",
    "outer:NAME", "outer:NAME|momentum".

    Raises CheckpointError if they cannot be read.
    """
    whole = [(word, folder / f"{word}.safetensors") for word in ("model", "trained", "optimizer", "averaged", "outer")]
    several = [("", path) for path in part_paths(folder)]
    try:
        with open_parts(several or [(word, path) for word, path in whole if path.is_file()]) as parts:
            yield parts
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else _unreadable(folder, error) from error


def read_trainer(folder: Path, device: torch.device) -> Resumed:
    """Read what `save_trainer` wrote. Raises CheckpointError if a part cannot be read."""
    try:
        record = json.loads((folder / "trainer.json").read_text())
        carried = record["carried"]
        if carried is not None:
            carried = [load_state(folder / f"carried-{i}.safetensors").to(device) for i in range(carried)]
        return Resumed(folder, load_file(folder / "rng.safetensors"), Tally.from_dict(record["tally"]), carried)
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
