"""Measured parts of a report, kept in its folder under what they depend on, so that nothing is measured twice."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastweight.configs import require, to_json
from fastweight.files import write_text
from fastweight.model import Model

FOLDER = "report.parts"
VERSION = 2  # of the measurements; a change to what one of them means makes the old files useless


class Parts:
    """Results by key; a folder of None keeps nothing."""

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder) / FOLDER

    def get(self, part: str, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """The kept result of `part` under `key`, or that of `measure`, which is then kept. It is plain JSON data.

        Raises ValueError for a kept file that is damaged.
        """
        key = {"part": part, "version": VERSION, **key}
        if self.folder is None:
            return json.loads(to_json(measure()))
        path = self.folder / f"{part}-{fingerprint([to_json(key).encode()])}.json"
        if path.is_file():
            return _load(path, key)
        text = to_json({"key": key, "result": measure()})
        write_text(path, text + "\n")
        return json.loads(text)["result"]


def _load(path: Path, key: dict[str, Any]) -> Any:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it, and it is measured again.") from error
    require(
        isinstance(kept, dict) and kept.get("key") == json.loads(to_json(key)) and "result" in kept,
        f"{path} is not what its name says. Remove it, and it is measured again.",
    )
    return kept["result"]


def fingerprint(parts: Iterable[bytes | np.ndarray]) -> str:
    """16 hex digits of the sha256 of byte strings and arrays."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
        digest.update(b"|")
    return digest.hexdigest()[:16]


def model_fingerprint(model: Model) -> str:
    """Of everything that the model computes with: config, order of blocks, weights, and which memories learn or are set
    aside."""
    digest = hashlib.sha256(to_json([model.config.to_dict(), model.visits]).encode())
    for name, module in model.named_modules():
        switches = [getattr(module, switch, None) for switch in ("learning", "as_backbone")]
        digest.update(f"{name} {switches}".encode() if switches != [None, None] else b"")
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
