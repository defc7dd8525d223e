"""What readers and writers of checkpoint folders share: strict safetensors, checked settings, empty models."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.convert.base import read_json
from fastweight.model import Model, ModelConfig
from fastweight.tensor_files import read_tensors

LARGEST_FLOAT = sys.float_info.max
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(src: Path) -> dict[str, Tensor]:
    """All tensors of a folder with one safetensors file, or with shards and their index."""
    single, index = src / WEIGHTS, src / INDEX
    if single.is_file():
        return _load(single)
    if not index.is_file():
        pickled = sorted(p.name for p in src.glob("*.bin"))
        hint = f" {pickled[0]} is a pickle, which can run code; convert it to safetensors first." if pickled else ""
        raise FileNotFoundError(f"{src} holds neither {WEIGHTS} nor {INDEX}.{hint}")
    listed = read_json(index, 'a "weight_map" of tensor names to files').get("weight_map")
    good = isinstance(listed, dict) and all(isinstance(v, str) and Path(v).name == v for v in listed.values())
    require(good, f'{index}: "weight_map" must map tensor names to file names in the same folder.')
    found: dict[str, Tensor] = {}
    assert isinstance(listed, dict)
    for shard in sorted(set(listed.values())):
        part = _load(src / shard)
        wanted = {name for name, file in listed.items() if file == shard}
        wrong = sorted(wanted ^ part.keys())
        require(not wrong, f"{src / shard} and {INDEX} disagree about {', '.join(wrong[:8])}.")
        found |= part
    return found


def _load(path: Path) -> dict[str, Tensor]:
    require(path.is_file(), f"{path} is missing.")
    return read_tensors(path, "Fetch it again.").tensors


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits (a NaN equals itself)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_number(what: str, wanted: type, value: Any) -> Any:
    """`value` as an int, finite float or bool; anything else, like text or a fraction for an int, is refused."""
    right = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
    right = right and isinstance(value, bool) == (wanted is bool)
    require(right, f"{what} must be {wanted.__name__}, got {type(value).__name__} {value!r}.")
    # JSON has no largest number, and Python's reader takes NaN and Infinity.
    require(wanted is not float or abs(value) <= LARGEST_FLOAT, f"{what} must be finite, got {value!r}.")
    return wanted(value)


def skeleton(config: ModelConfig) -> Model:
    """The model with its shapes but no memory behind them."""
    with torch.device("meta"):
        return Model(config)


def require_equal(format: str, config: ModelConfig, held: ModelConfig) -> None:
    """Raises ValueError naming what of `config` the format cannot hold: `held` is what it would come back as."""
    wanted, got = _flat(held.to_dict()), _flat(config.to_dict())
    other = [
        f"{key} is {got.get(key)!r} (needs {wanted.get(key)!r})"
        for key in sorted(wanted.keys() | got.keys())
        if got.get(key) != wanted.get(key)
    ]
    require(not other, f"{format} cannot hold this model: {'; '.join(other[:4])}.")


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    """Nested JSON as {"blocks[0].mixer.kind": value}."""
    if isinstance(data, dict):
        return {k: v for key, child in data.items() for k, v in _flat(child, f"{name}.{key}".lstrip(".")).items()}
    if isinstance(data, list):
        return {k: v for i, child in enumerate(data) for k, v in _flat(child, f"{name}[{i}]").items()}
    return {name: data}
