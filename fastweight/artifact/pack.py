"""A model as one small file, and back: what is scored is what comes out of the file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastweight.artifact import entropy
from fastweight.artifact.entropy import Part
from fastweight.artifact.file import ADVICE, ArtifactError, Content, join, read, split
from fastweight.artifact.hessians import Hessians
from fastweight.artifact.layout import (
    FLOATS,
    Codes,
    Entry,
    all_rows,
    build,
    code_parts,
    codes_of,
    describe_tensor,
    float_parts,
    join_planes,
    kept_of,
    read_entry,
    read_rows,
    scales_of,
)
from fastweight.artifact.quantise import Quantised, make_solvers, quantise
from fastweight.artifact.spec import PackSpec
from fastweight.artifact.tokenizer_part import check_files, read_tokenizer, tokenizer_files
from fastweight.configs import check_keys, require
from fastweight.data import Tokenizer
from fastweight.model import Model
from fastweight.model_config import ModelConfig

FORMAT = "fastweight-artifact"
KEYS = ("format", "config", "signature", "origin", "spec", "tensors", "plain", "codes", "tokenizer")
MOST_PARAMETERS = 1 << 31


class Unpacked(NamedTuple):
    """config, spec, origin: as packed. quantised: every tensor. tokenizer: or None. content: the file's parts."""

    config: ModelConfig
    spec: PackSpec
    origin: dict[str, Any] | None
    quantised: Quantised
    tokenizer: Tokenizer | None
    content: Content


def pack(
    model: Model, spec: PackSpec, *, hessians: Hessians | None = None, tokenizer: Tokenizer | None = None
) -> bytes:
    """The bytes of one file that holds `model` quantised as `spec` says, and its tokenizer.

    hessians: of `collect_hessians`, for the method "gptq". Equal weights give equal bytes. Raises ValueError for
    weights or Hessians that are not finite, ImportError if brotli or zstandard is missing.
    """
    return encode(model, spec, quantise(model, spec, make_solvers(spec, hessians)), tokenizer)


def encode(model: Model, spec: PackSpec, quantised: Quantised, tokenizer: Tokenizer | None = None) -> bytes:
    """The file's bytes for what `quantise` made of `model`."""
    named, blob = tokenizer_files(tokenizer)
    floats = [scales_of(quantised), *(kept_of(quantised, dtype) for dtype in FLOATS)]
    plain = [part for values in floats for part in float_parts(values)]
    plain.append(Part(np.frombuffer(blob, np.uint8)[None]))
    rows = [item for stored in quantised.values() for item in all_rows(stored)]
    plain_record, plain_bytes = entropy.encode(plain)
    codes_record, codes_bytes = entropy.encode(code_parts(rows))
    manifest = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "signature": model.signature,
        "origin": model.origin,
        "spec": dataclasses.asdict(spec),
        "tensors": [describe_tensor(name, stored) for name, stored in quantised.items()],
        "plain": plain_record | {"size": len(plain_bytes)},
        "codes": codes_record | {"size": len(codes_bytes)},
        "tokenizer": named,
    }
    return join(manifest, plain_bytes + codes_bytes)


def unpack(source: bytes | str | Path, *, max_parameters: int = MOST_PARAMETERS) -> Model:
    """The model in a packed file (its bytes or path), with the dequantised weights, on the CPU.

    Raises ArtifactError for a file that is truncated, altered, of another format, contradicts itself, or announces a
    model of more than `max_parameters`; nothing of that size is allocated before.
    """
    found = unpack_all(source, max_parameters=max_parameters)
    model = Model(found.config)
    for name, stored in found.quantised.items():
        model.get_parameter(name).data = stored.value()
    model.origin = found.origin
    return model


def unpack_tokenizer(source: bytes | str | Path) -> Tokenizer | None:
    """The tokenizer in a packed file, None if there is none. Raises ArtifactError like `unpack`."""
    return unpack_all(source).tokenizer


def unpack_all(source: bytes | str | Path, *, max_parameters: int = MOST_PARAMETERS) -> Unpacked:
    """Everything in a packed file. Raises ArtifactError like `unpack`."""
    content = split(source if isinstance(source, bytes) else read(source))
    try:
        return _decode(content, max_parameters)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"the packed model contradicts itself: {error}. {ADVICE}") from error


def _decode(content: Content, max_parameters: int) -> Unpacked:
    manifest = content.manifest
    check_keys("manifest", manifest, KEYS, KEYS)
    require(manifest["format"] == FORMAT, f"its format is {manifest['format']!r}, {FORMAT!r} is needed")
    config = ModelConfig.from_dict(manifest["config"])
    require(config.signature == manifest["signature"], "its config is not the one that was packed (signature)")
    origin = manifest["origin"]
    require(origin is None or isinstance(origin, dict), "its origin is no object")
    entries = _entries(config, manifest["tensors"], max_parameters)
    named = check_files(manifest["tokenizer"])
    plain_bytes, codes_bytes = _sections(manifest, content.payload)
    *planes, blob = _decode_plain(plain_bytes, manifest["plain"], entries, sum(size for _, size in named))
    codes = [codes for entry in entries for codes in codes_of(entry)]
    scales = np.split(planes[0], np.cumsum([c.shape[0] for c in codes])[:-1]) if codes else []
    require(bool((np.isfinite(planes[0]) & (planes[0] >= 0)).all()), "a step is negative or not finite")
    rows = _decode_codes(codes_bytes, manifest["codes"], codes, scales)
    quantised = build(entries, iter(rows), dict(zip(FLOATS, planes[1:], strict=True)))
    spec = PackSpec.from_dict(manifest["spec"])
    return Unpacked(config, spec, origin, quantised, read_tokenizer(manifest["tokenizer"], blob.tobytes()), content)


def _entries(config: ModelConfig, records: Any, max_parameters: int) -> list[Entry]:
    """The manifest's tensors, checked against those of the config, which exist only as shapes here."""
    try:
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in Model(config).state_dict().items()}
    except RuntimeError as error:
        raise ValueError(f"its config makes no model: {error}") from error
    total = sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())
    require(total <= max_parameters, f"its config has {total:,} parameters, at most {max_parameters:,} are read here")
    good = isinstance(records, list) and len(records) == len(shapes)
    require(good, f"its manifest must list the {len(shapes)} tensors of its config")
    return [read_entry(record, *item) for record, item in zip(records, shapes.items(), strict=True)]


def _sections(manifest: dict[str, Any], payload: bytes) -> tuple[bytes, bytes]:
    sizes = []
    for name in ("plain", "codes"):
        record = manifest[name]
        require(isinstance(record, dict) and type(record.get("size")) is int, f"the record of {name} is damaged")
        require(record["size"] >= 0, f"the size of {name} is negative")
        sizes.append(record["size"])
    require(sum(sizes) == len(payload), f"its parts have {sum(sizes)} bytes together, the file has {len(payload)}")
    return payload[: sizes[0]], payload[sizes[0] :]


def _record(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "size"}


def _decode_plain(
    data: bytes, record: dict[str, Any], entries: Sequence[Entry], blob_bytes: int
) -> list[np.ndarray]:  # fmt: skip
    """Steps float16, kept numbers by FLOATS, and the tokenizer's bytes."""
    rows = sum(codes.shape[0] for entry in entries for codes in codes_of(entry))
    numbers = [("float16", rows)] + [
        (dtype, sum(int(np.prod(e.shape, dtype=np.int64)) for e in entries if e.stored == dtype)) for dtype in FLOATS
    ]
    widths = [np.dtype(FLOATS[dtype]).itemsize for dtype, _ in numbers]
    shapes = [(1, n) for (_, n), width in zip(numbers, widths, strict=True) for _ in range(width)]
    shapes.append((1, blob_bytes))
    found = iter(entropy.decode(data, _record(record), shapes, [None] * len(shapes)))
    planes = [[next(found) for _ in range(width)] for width in widths]
    values = [join_planes(p, FLOATS[dtype]) for p, (dtype, _) in zip(planes, numbers, strict=True)]
    return [*values, next(found)]


def _decode_codes(
    data: bytes, record: dict[str, Any], codes: Sequence[Codes], scales: Sequence[np.ndarray]
) -> list[Any]:  # fmt: skip
    classes = [entropy.row_classes(s) if c.conditioned else None for c, s in zip(codes, scales, strict=True)]
    found = entropy.decode(data, _record(record), [c.shape for c in codes], classes)
    return [read_rows(*item) for item in zip(found, scales, codes, strict=True)]
