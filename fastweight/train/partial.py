"""Runs that train a part of a model: the frozen rest is written once, checkpoints hold what is trained alone."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastweight.configs import require
from fastweight.data import Tokenizer
from fastweight.distributed.copies import read_state
from fastweight.model import Model, check_weights, load
from fastweight.optim.cut import local
from fastweight.tensor_files import checksum
from fastweight.train import folders
from fastweight.train.checkpoint import open_tensors, save_model
from fastweight.train.folders import CheckpointError

BASE, TRAINED = "base", "trained.safetensors"


def weights_checksum(model: Model) -> str:
    """CRC-32 of all weights, as in the header of a model folder."""
    return checksum({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()})


def save_base(out: Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write the model that the run starts from into out/base."""
    folders.replace_folder(out / BASE, lambda folder: save_model(folder, model, tokenizer))


def read_base(out: Path, crc32: str) -> Model:
    """Read what `save_base` wrote. Raises CheckpointError unless it is the model that the run was started with."""
    folder = out / BASE
    advice = "Restore the folder from a copy; its checkpoints need it."
    try:
        model = load(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error} {advice}") from error
    if weights_checksum(model) != crc32:
        raise CheckpointError(f"{folder} is not the model that this run was started with. {advice}")
    return model


def save_trained(folder: Path, model: Model, names: list[str]) -> None:
    """Write the parameters `names` of `model` into the checkpoint `folder`."""
    save_file({name: t.detach().cpu().contiguous() for name, t in _named(model, names).items()}, folder / TRAINED)


def load_trained(folder: Path, model: Model, names: list[str]) -> None:
    """Put what `save_trained` wrote into `model`. Raises CheckpointError if it does not fit."""
    wanted = _named(model, names)
    try:
        with open_tensors(folder) as tensors:
            found = read_state(tensors.under("trained"), wanted)
        check_weights(str(folder), found, {name: tuple(t.shape) for name, t in wanted.items()})
        wrong = [name for name, t in found.items() if t.dtype != wanted[name].dtype]
        require(not wrong, f"{folder}: other dtypes than the model's in {', '.join(wrong[:5])}.")
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    with torch.no_grad():
        for name, parameter in wanted.items():
            local(parameter).copy_(local(found[name]))


def _named(model: Model, names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names}
