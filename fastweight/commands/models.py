"""Finding a model and its tokenizer, and saying what will run."""

import dataclasses
import json
from pathlib import Path

from fastweight.backends import describe_backends, describe_layers
from fastweight.configs import require
from fastweight.data.tokenizers import Tokenizer, load_tokenizer
from fastweight.devices import pick_device
from fastweight.generate import WEIGHTS_FILE
from fastweight.model import Model, load
from fastweight.train.config import TrainConfig

TOKENIZER_FOLDER = "tokenizer"


def find_model(path: str | Path) -> Path:
    """The model folder that `path` means: itself, or the final model or newest checkpoint of a run's folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model {path} does not exist. Give a model folder or the folder of a training run.")
    pointer = path / "latest"
    candidates = [path, path / "model"]
    if pointer.is_file():
        candidates.append(path / "checkpoints" / Path(pointer.read_text().strip()).name)
    for folder in candidates:
        if (folder / WEIGHTS_FILE).is_file():
            _refuse_foreign(folder)
            return folder
    require(
        not (path / "base").is_dir(),
        f"{path} is an unfinished run that trains a part of a model; its checkpoints hold that part alone. Finish it: "
        f"fastweight train --resume {path} (or run `fastweight convert` again, if that began it).",
    )
    holds = ", ".join(sorted(p.name for p in path.iterdir())[:5]) if path.is_dir() else "is a file"
    raise ValueError(
        f"{path} is no model folder: it needs config.json and {WEIGHTS_FILE} (found: {holds or 'nothing'}). "
        "Train one with `fastweight train`, or bring one with `fastweight import`."
    )


def with_model_of_run(config: TrainConfig) -> TrainConfig:
    """`config` with the model folder that model.folder means, where that is the folder of a run."""
    folder = config.model.folder
    if not folder or not (Path(folder) / "latest").is_file():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, folder=str(find_model(folder))))


def _refuse_foreign(folder: Path) -> None:
    """Say what to do with a checkpoint in the form of transformers."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # said when it is loaded
    family = config.get("model_type") if isinstance(config, dict) and "format" not in config else None
    own = "Give the model folder that it was saved from (of a conversion DIR: DIR itself)."
    other = f"Bring it here first: `fastweight import {folder} MODEL --format hf`."
    require(
        family is None,
        f"{folder} is a checkpoint of transformers (model_type {family!r}), not a model folder. "
        f"{own if family == 'fastweight' else other}",
    )


def open_model(folder: Path, device: str, backend: str) -> Model:
    """Load a model folder onto `device` ("auto": a GPU if there is one) with one backend for all its ops."""
    model = load(folder, pick_device(device)).set_backend(backend)
    describe_backends(model)  # a backend that cannot run is refused now
    return model.eval()


def find_tokenizer(folder: Path, chosen: str | None, model: Model) -> Tokenizer:
    """The tokenizer `chosen` by the user, else the one inside the model folder; its ids must fit the model."""
    inside = folder / TOKENIZER_FOLDER
    if chosen is None and not inside.is_dir():
        raise ValueError(
            f"{folder} has no {TOKENIZER_FOLDER}/ inside. Name one: --tokenizer bytes, or --tokenizer FOLDER."
        )
    tokenizer = load_tokenizer(str(inside) if chosen is None else chosen)
    check_vocabulary(tokenizer, model)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer with more ids than the model has rows."""
    require(
        tokenizer.vocab_size <= model.config.vocab_size,
        f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}. "
        "Use the tokenizer that the model was trained with.",
    )


def describe_model(folder: Path, model: Model) -> list[str]:
    """Lines that say which model runs, and on which backends."""
    layers = describe_layers(model.config)
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    return [
        f"model     {folder} · {model.num_parameters:,} parameters · {layers} · {dtype} on {model.device}",
        *(f"backend   {op}: {reason}" for op, reason in describe_backends(model).items()),
    ]
