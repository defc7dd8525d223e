"""What is stored of a model, laid out as arrays of bytes for the coders, and back."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastweight.artifact.entropy import Part, row_classes
from fastweight.artifact.groups import REST_GROUP
from fastweight.artifact.low_rank import Correction
from fastweight.artifact.quantise import Kept, Matrix, Quantised, Stored
from fastweight.artifact.rows import Rows
from fastweight.artifact.spec import GROUPS, METHODS
from fastweight.configs import check_keys, require

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
FLOATS = {"float16": "<f2", "float32": "<f4"}
MATRIX_KEYS = ("name", "group", "dtype", "bits", "clip", "method")
CORRECTION_KEYS = ("rank", "factor_bits")
KEPT_KEYS = ("name", "group", "dtype", "stored")


class Entry(NamedTuple):
    """What the manifest says of one tensor. bits is 0 for one that is kept as it is, rank 0 without a correction."""

    name: str
    group: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str = ""
    bits: int = 0
    clip: float = 0.0
    method: str = ""
    rank: int = 0
    factor_bits: int = 0


class Codes(NamedTuple):
    """One array of codes. bits: its width. shape: rows, columns. conditioned: coded by the classes of its rows."""

    bits: int
    shape: tuple[int, int]
    conditioned: bool


def describe_tensor(name: str, stored: Stored) -> dict[str, Any]:
    """The manifest's record of one tensor."""
    common = {"name": name, "group": stored.group, "dtype": str(stored.dtype).removeprefix("torch.")}
    if isinstance(stored, Kept):
        return common | {"stored": str(stored.stored.dtype).removeprefix("torch.")}
    record = common | {"bits": stored.bits, "clip": stored.clip, "method": stored.method}
    if stored.correction is None:
        return record
    return record | {"rank": len(stored.correction.left.codes), "factor_bits": stored.correction.bits}


def read_entry(record: Any, name: str, shape: tuple[int, ...]) -> Entry:
    """Check a record of the manifest against the tensor that the config wants there. Raises ValueError."""
    owner = f"the record of {name}"
    require(isinstance(record, dict), f"{owner} is no object")
    keys = KEPT_KEYS if "stored" in record else MATRIX_KEYS + (CORRECTION_KEYS if "rank" in record else ())
    check_keys(owner, record, keys, keys)
    require(record["name"] == name, f"{owner}: the manifest has {record['name']!r} in its place")
    require(record["dtype"] in DTYPES, f"{owner}: unknown dtype {record['dtype']!r}")
    require(record["group"] in (*GROUPS, REST_GROUP), f"{owner}: unknown group {record['group']!r}")
    entry = Entry(**(record | {"shape": shape, "dtype": DTYPES[record["dtype"]]}))
    if "stored" in record:
        require(entry.stored in FLOATS, f"{owner}: it cannot be stored as {entry.stored!r}")
        return entry
    require(len(shape) == 2, f"{owner}: a matrix has two dimensions, this tensor has {len(shape)}")
    require(entry.method in METHODS, f"{owner}: unknown method {entry.method!r}")
    require(isinstance(entry.clip, int | float), f"{owner}: its clip is no number")
    require(type(entry.bits) is int and 4 <= entry.bits <= 8, f"{owner}: {entry.bits!r} bits; 4 to 8 are possible")
    if "rank" in record:
        good = type(entry.rank) is int and 1 <= entry.rank <= min(shape)
        require(good, f"{owner}: a correction of rank {entry.rank!r} does not fit the shape {list(shape)}")
        good = type(entry.factor_bits) is int and 2 <= entry.factor_bits <= 8
        require(good, f"{owner}: its correction cannot have {entry.factor_bits!r} bits")
    return entry


def codes_of(entry: Entry) -> list[Codes]:
    """The arrays of codes of one tensor: the matrix and the two factors of its correction."""
    if not entry.bits:
        return []
    found = [Codes(entry.bits, (entry.shape[0], entry.shape[1]), True)]
    return found + [Codes(entry.factor_bits, (entry.rank, n), False) for n in entry.shape if entry.rank]


def all_rows(stored: Stored) -> list[tuple[Rows, int, bool]]:
    """Rows, width and whether their classes are used, in the order of `codes_of`."""
    if isinstance(stored, Kept):
        return []
    found = [(stored.rows, stored.bits, True)]
    if stored.correction is not None:
        found += [(rows, stored.correction.bits, False) for rows in (stored.correction.left, stored.correction.right)]
    return found


def code_parts(rows: Sequence[tuple[Rows, int, bool]]) -> list[Part]:
    """Codes shifted to 0 … 2 qmax, with the classes of their rows."""
    return [
        Part(
            (codes.numpy().astype(np.int16) + (1 << (bits - 1)) - 1).astype(np.uint8),
            row_classes(scales.numpy()) if conditioned else None,
        )
        for (codes, scales), bits, conditioned in rows
    ]


def float_parts(values: np.ndarray) -> list[Part]:
    """One part per byte of little-endian numbers [n]: all first bytes, all second bytes, …"""
    planes = values.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return [Part(np.ascontiguousarray(planes[:, i])[None]) for i in range(values.dtype.itemsize)]


def join_planes(planes: Sequence[np.ndarray], dtype: str) -> np.ndarray:
    """Undo `float_parts`."""
    return np.ascontiguousarray(np.concatenate(planes).T).reshape(-1).view(dtype)


def scales_of(quantised: Quantised) -> np.ndarray:
    """The steps of all rows, float16, in the order of the arrays of codes."""
    found = [rows.scales.numpy() for stored in quantised.values() for rows, _, _ in all_rows(stored)]
    return np.concatenate(found or [np.zeros(0)]).astype(FLOATS["float16"])


def kept_of(quantised: Quantised, dtype: str) -> np.ndarray:
    """All numbers that are stored as `dtype`, one tensor after the other."""
    wanted = DTYPES[dtype]
    kept = [s.stored for s in quantised.values() if isinstance(s, Kept) and s.stored.dtype == wanted]
    found = [tensor.reshape(-1).numpy() for tensor in kept]
    return np.concatenate(found or [np.zeros(0)]).astype(FLOATS[dtype])


def build(entries: Sequence[Entry], codes: Iterator[Rows], kept: dict[str, np.ndarray]) -> Quantised:
    """Put decoded arrays together. codes: in the order of `codes_of`. kept: flat numbers by dtype."""
    found: Quantised = {}
    position = dict.fromkeys(kept, 0)
    for entry in entries:
        if not entry.bits:
            start = position[entry.stored]
            position[entry.stored] = stop = start + int(np.prod(entry.shape, dtype=np.int64))
            values = torch.from_numpy(kept[entry.stored][start:stop].copy()).reshape(entry.shape)
            found[entry.name] = Kept(entry.group, entry.dtype, values)
            continue
        rows = next(codes)
        correction = Correction(entry.factor_bits, next(codes), next(codes)) if entry.rank else None
        clip, method = float(entry.clip), entry.method
        found[entry.name] = Matrix(entry.group, entry.dtype, entry.bits, clip, method, rows, correction)
    return found


def read_rows(symbols: np.ndarray, scales: np.ndarray, codes: Codes) -> Rows:
    """Rows from symbols that may come from anywhere. Raises ValueError for a code beyond its width."""
    qmax = (1 << (codes.bits - 1)) - 1
    highest = int(symbols.max()) if symbols.size else 0
    require(highest <= 2 * qmax, f"a code of {codes.bits} bits is {highest - qmax}, at most {qmax} is possible")
    return Rows(_tensor(symbols.astype(np.int16) - qmax, np.int8), _tensor(scales, np.float16))


def _tensor(values: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(values.astype(dtype))
