"""The folder of a model: its settings beside the weights, and what the weights must be."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fastweight import files
from fastweight.configs import require, to_json
from fastweight.model_config import ModelConfig, fingerprint

FORMAT, VERSION = "fastweight-model", 1
ORIGIN_FILE = "origin.json"


def write_settings(folder: Path, config: ModelConfig, origin: dict[str, Any] | None) -> None:
    """Write config.json and, if there is one, origin.json, each atomically."""
    text = to_json({"format": FORMAT, "version": VERSION, "config": config.to_dict()})
    files.write_text(folder / "config.json", text + "\n")
    if origin is not None:
        files.write_text(folder / ORIGIN_FILE, to_json(origin) + "\n")


def load_config(path: str | Path) -> ModelConfig:
    """The ModelConfig of a model folder."""
    return read_config(Path(path))[0]


def read_config(path: Path) -> tuple[ModelConfig, str]:
    """The config of a model folder, and the signature of the config as it is written there.

    A setting that a later version adds changes the signature of the config, but not that of what is written.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a model folder holds config.json and model.safetensors.")
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}).") from error
    require(isinstance(data, dict) and data.get("format") == FORMAT, f"{file} is not a {FORMAT} config.")
    require(data.get("version") == VERSION, f"{file}: version {data.get('version')}, this library reads {VERSION}.")
    require(isinstance(data.get("config"), dict), f"{file}: the model's config is missing. Restore it from a copy.")
    try:
        return ModelConfig.from_dict(data["config"]), fingerprint(data["config"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Where the model in a folder comes from, None if it says nothing. Raises ValueError for a damaged file."""
    file = folder / ORIGIN_FILE
    if not file.is_file():
        return None
    try:
        origin = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}). Restore it, or delete it to go without.") from error
    require(isinstance(origin, dict), f"{file} must hold an object. Restore it, or delete it to go without.")
    return origin


def check_weights(source: str, found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    """Refuse missing, unexpected and misshapen tensors, and whole numbers, by name."""
    problems = [f"missing {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    problems += [f"unexpected {name} {list(t.shape)}" for name, t in found.items() if name not in wanted]
    problems += [
        f"{name} has shape {list(t.shape)}, needs {list(wanted[name])}"
        for name, t in found.items()
        if name in wanted and tuple(t.shape) != wanted[name]
    ]
    more = f" … and {len(problems) - 8} more" if len(problems) > 8 else ""
    require(not problems, f"{source} does not fit this model: {'; '.join(problems[:8])}{more}.")
    whole = [f"{name} ({t.dtype})" for name, t in found.items() if not t.is_floating_point()]
    require(not whole, f"{source}: weights must be floating-point, not so: {', '.join(whole[:8])}.")
