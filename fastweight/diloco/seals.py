"""What is written into the folder beside tensors: JSON with one spelling, checksums and signatures."""

import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fastweight.configs import require

SIGNATURE = "hmac_sha256"
LEAST_KEY, NEW_KEY = 16, 32


def to_bytes(record: Mapping[str, Any]) -> bytes:
    """The one JSON spelling of a record: sorted keys, no spaces."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def from_bytes(data: bytes, what: str) -> dict[str, Any]:
    """Read a record. Raises ValueError naming `what` if it is not a JSON object."""
    try:
        record = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}).") from error
    require(isinstance(record, dict), f"{what} is not a JSON object.")
    return record


def _finite(text: str) -> float:
    value = float(text)
    require(math.isfinite(value), f"{text} is not finite")
    return value


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sign(record: Mapping[str, Any], key: bytes | None) -> dict[str, Any]:
    """`record` with its HMAC-SHA256 under `key`; as it is without a key."""
    return dict(record) if key is None else {**record, SIGNATURE: _signature(record, key)}


def check_signature(record: Mapping[str, Any], key: bytes | None, what: str) -> None:
    """Raise ValueError unless `record` was signed with `key`; None accepts everything."""
    if key is None:
        return
    unsigned = {name: value for name, value in record.items() if name != SIGNATURE}
    given = record.get(SIGNATURE)
    right = isinstance(given, str) and hmac.compare_digest(given.encode(), _signature(unsigned, key).encode())
    require(right, f"{what}: its signature is not that of this worker's key.")


def read_keys(path: Path) -> dict[str, bytes]:
    """The workers' keys from a file with {"worker": "hexadecimal digits", ...}, each at least 16 bytes long."""
    keys = {}
    for worker, value in from_bytes(path.read_bytes(), str(path)).items():
        try:
            keys[worker] = bytes.fromhex(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: the key of {worker!r} is not a text of hexadecimal digits.") from error
        require(len(keys[worker]) >= LEAST_KEY, f"{path}: the key of {worker!r} is shorter than {LEAST_KEY} bytes.")
    return keys


def write_keys(path: Path, workers: Iterable[str]) -> None:
    """Write a new file with a new key for each worker, readable by its owner alone."""
    require(not path.exists(), f"{path} exists already; keys are not replaced. Choose another file.")
    keys = {worker: secrets.token_hex(NEW_KEY) for worker in workers}
    require(bool(keys), "keys: name at least one worker.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(keys, indent=2) + "\n")


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file. Raises ValueError naming `what` if it is none."""
    try:
        return load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what} is no safetensors file: {error}") from error


def is_finite(vector: Tensor) -> bool:
    """Whether every entry is finite."""
    return bool(torch.isfinite(vector).all())


def _signature(record: Mapping[str, Any], key: bytes) -> str:
    return hmac.new(key, to_bytes(record), hashlib.sha256).hexdigest()
