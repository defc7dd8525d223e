"""A state dict as one safetensors file, or as several with their index."""

import json
import re
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastweight import files
from fastweight.configs import require
from fastweight.convert.folders import INDEX, WEIGHTS

ANY_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def write_shards(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write `weights` into `folder`, no file with more than shard_bytes unless one tensor alone is larger.

    Weights that were there before are replaced: no file of theirs is left that a reader could take for these.
    """
    require(shard_bytes > 0, f"shard_bytes must be positive, got {shard_bytes}.")
    groups = _group(weights, shard_bytes)
    names = [WEIGHTS]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        # First: shards of two models must not stand under one index when this is interrupted.
        (folder / INDEX).unlink(missing_ok=True)
    for name, group in zip(names, groups, strict=True):
        part = {tensor: weights[tensor] for tensor in group}
        files.write_atomically(folder / name, lambda path, part=part: save_file(part, path, {"format": "pt"}))
    if len(groups) > 1:
        size = sum(tensor.nbytes for tensor in weights.values())
        places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        files.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    _remove_others(folder, names)


def _remove_others(folder: Path, names: list[str]) -> None:
    """Remove weights in `folder` that are none of `names`; an index without shards, too."""
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
    for file in folder.iterdir():
        if ANY_WEIGHTS.fullmatch(file.name) and file.name not in names:
            file.unlink()


def _group(weights: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would not fit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if groups[-1] and filled + tensor.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    return groups
