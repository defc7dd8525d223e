"""Tensors of which several files hold some rows each: safetensors with a header that says which, never a pickle."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastweight.configs import require
from fastweight.optim.cut import cut_of, local

FORMAT, VERSION = "fastweight-part", "1"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}


class Piece(NamedTuple):
    """Rows start to start + size - 1 of a tensor of `total` rows: the tensor `key` of an open file."""

    file: Any
    key: str
    start: int
    size: int
    total: int


def part_name(rank: int, size: int) -> str:
    """The file of process `rank` of `size`."""
    return f"part-{rank:05d}-of-{size:05d}.safetensors"


def own_rows(named: Mapping[str, Tensor], leads: bool) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Copies on the host of what this process has to write: its rows, and where they lie: (first, number in all).

    Of tensors that every process holds whole, the leader alone writes; of replicas the first.
    """
    held, rows = {}, {}
    for name, tensor in named.items():
        cut, own = cut_of(tensor), local(tensor.detach())
        total = tensor.shape[0] if tensor.dim() else 1
        first = 0 if cut is None else cut.slice(total).start
        if leads if cut is None else cut.replica == 0 and len(own):
            held[name], rows[name] = own.to("cpu", copy=True).contiguous(), (first, total)
    return held, rows


def write_part(path: Path, held: Mapping[str, Tensor], rows: Mapping[str, tuple[int, int]]) -> None:
    """Write what `own_rows` returned."""
    save_file(dict(held), path, {"format": FORMAT, "version": VERSION, "rows": json.dumps(rows)})


class Parts:
    """Named tensors spread over open files, each readable row by row.

    Raises ValueError where rows are missing, or there twice, and for dtypes other than those of weights.
    """

    def __init__(self, pieces: dict[str, list[Piece]]):
        self._pieces = pieces
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.start + piece.size for piece in found)]
            complete = [piece.start for piece in found] == ends[:-1] and {piece.total for piece in found} == {ends[-1]}
            require(complete, f"rows of {name!r} are missing, or there twice.")

    def names(self) -> list[str]:
        return list(self._pieces)

    def under(self, word: str) -> "Parts":
        """The tensors "word:NAME", by NAME."""
        prefix = f"{word}:"
        return Parts({name.removeprefix(prefix): p for name, p in self._pieces.items() if name.startswith(prefix)})

    def whole(self, name: str) -> Tensor:
        """All rows of a tensor, or a scalar."""
        found = [piece.file.get_tensor(piece.key) for piece in self._pieces[name]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def rows(self, name: str, wanted: slice) -> Tensor:
        """Some rows of a tensor; no others are read."""
        found = [torch.empty((0, *self.shape(name)[1:]), dtype=self.dtype(name))]
        for piece in self._pieces[name]:
            start, stop = (min(max(row - piece.start, 0), piece.size) for row in (wanted.start, wanted.stop))
            found += [piece.file.get_slice(piece.key)[start:stop]] if start < stop else []
        return torch.cat(found)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        piece = self._pieces[name][0]
        return DTYPES[piece.file.get_slice(piece.key).get_dtype()]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        piece = self._pieces[name][0]
        shape = piece.file.get_slice(piece.key).get_shape()
        return (piece.total, *shape[1:]) if shape else ()


@contextmanager
def open_parts(files: Iterable[tuple[str, Path]]) -> Iterator[Parts]:
    """Open files, each with the word that its tensors are found under; "" where their names have it already.

    Raises ValueError for a file that cannot be read.
    """
    pieces: dict[str, list[Piece]] = {}
    with ExitStack() as stack:
        for word, path in files:
            try:
                file: Any = stack.enter_context(safe_open(path, framework="pt"))
                found = _pieces(file)
            except (SafetensorError, OSError, ValueError, TypeError) as error:
                raise ValueError(f"{path} cannot be read ({error}).") from error
            for piece in found:
                pieces.setdefault(f"{word}:{piece.key}" if word else piece.key, []).append(piece)
        yield Parts(pieces)


def _pieces(file: Any) -> list[Piece]:
    """What an open file holds; one without our header holds whole tensors."""
    header, pieces = file.metadata() or {}, []
    is_part = header.get("format") == FORMAT
    require(not is_part or header.get("version") == VERSION, f"version {header.get('version')} is not {VERSION}")
    places = json.loads(header["rows"]) if is_part else {}
    for key in file.keys():  # noqa: SIM118  # not a dict
        shape = file.get_slice(key).get_shape()
        count = shape[0] if shape else 1
        first, total = places[key] if is_part else (0, count)
        pieces.append(Piece(file, key, int(first), count, int(total)))
    return pieces
