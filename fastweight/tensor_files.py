"""Files of named tensors: safetensors with a text header and a checksum, written atomically, never a pickle."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastweight.files import write_atomically


class TensorFile(NamedTuple):
    """What a file holds: its header, and its tensors by name."""

    header: dict[str, str]
    tensors: dict[str, Tensor]


def write_tensors(path: str | Path, named: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write `named` with `header` and their checksum to `path`; on any error the old file stays."""
    held = {name: t.detach().cpu().contiguous() for name, t in named.items()}
    metadata = {**header, "crc32": checksum(held)}

    def write(temporary: Path) -> None:
        save_file(held, temporary, metadata)
        _sort_header(temporary)

    write_atomically(path, write)


def read_tensors(path: str | Path, advice: str) -> TensorFile:
    """Read a safetensors file. Raises ValueError, ending in `advice`, if it is cut short or its bits have changed.

    A file without a checksum (another program wrote it) is read as it is.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}). {advice}") from error
    kept = header.get("crc32")
    if kept is not None and kept != checksum(found):
        raise ValueError(f"{path} is damaged: its tensors are not those that were written (checksum). {advice}")
    return TensorFile(header, found)


def _sort_header(path: Path) -> None:
    """Put the header's texts in the order of their names: safetensors writes them in a random one each time, and equal
    models should be equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def checksum(named: Mapping[str, Tensor]) -> str:
    """CRC-32 over the bytes of all tensors in the order of their names, as eight hexadecimal digits."""
    total = 0
    for _, tensor in sorted(named.items()):
        if tensor.numel():
            total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"
