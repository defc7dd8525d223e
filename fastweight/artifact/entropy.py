"""Arrays of small integers as few bytes: rANS with a table per class of rows, or another coder where it is smaller."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastweight.artifact import rans, tables
from fastweight.artifact.coders import CODERS, compress, decompress
from fastweight.artifact.tables import ALPHABET, code_bits, entropy_bits, frequencies
from fastweight.configs import require

CLASSES = (1, 2, 4, 8)
SAMPLE_BYTES = 1 << 15  # a slow coder runs on the whole part if it wins on so much of its middle


class Part(NamedTuple):
    """symbols: uint8 [rows, columns]. classes: uint8 [rows] in 0..7, known to the reader beforehand, or None."""

    symbols: np.ndarray
    classes: np.ndarray | None = None


class Coded(NamedTuple):
    """How one part was coded. data: its bytes, None in the shared rANS stream. size: bytes, for rANS its share."""

    coder: str
    num_classes: int
    tables: np.ndarray
    data: bytes | None
    size: float


def row_classes(scales: np.ndarray) -> np.ndarray:
    """The class 0..7 of each row: eight equal groups of rows by their scale [rows], ties in the order of rows."""
    rank = np.empty(len(scales), np.int64)
    rank[np.argsort(scales, kind="stable")] = np.arange(len(scales))
    return (rank * CLASSES[-1] // max(1, len(scales))).astype(np.uint8)


def encode(parts: Sequence[Part], coders: Sequence[str] = ("rans", *CODERS)) -> tuple[dict[str, Any], bytes]:
    """A record (JSON) and the bytes of `parts`: tables, the shared rANS stream, then each other part by itself.

    coders: those that may be chosen, per part by real size.
    """
    chosen = [choose(part, coders) for part in parts]
    shared = [(part, coded) for part, coded in zip(parts, chosen, strict=True) if coded.coder == "rans"]
    header, stream = _encode_shared(shared) if shared else (b"", b"")
    record = {
        "tables": len(header),
        "stream": len(stream),
        "parts": [[c.coder, c.num_classes if c.data is None else len(c.data)] for c in chosen],
    }
    return record, b"".join([header, stream, *(c.data for c in chosen if c.data is not None)])


def _encode_shared(shared: Sequence[tuple[Part, Coded]]) -> tuple[bytes, bytes]:
    """The tables and the one stream of all parts that rANS codes."""
    header = zlib.compress(b"".join(tables.to_bytes(t) for _, coded in shared for t in coded.tables), 9)
    bases = np.cumsum([0] + [coded.num_classes for _, coded in shared])
    contexts = [_contexts(part, coded.num_classes) + base for (part, coded), base in zip(shared, bases)]
    symbols = np.concatenate([part.symbols.reshape(-1) for part, _ in shared])
    return header, rans.encode(symbols, np.concatenate(contexts), np.concatenate([c.tables for _, c in shared]))


def choose(part: Part, coders: Sequence[str] = ("rans", *CODERS)) -> Coded:
    """The smallest coding of one part."""
    found = [_rans(part)] if "rans" in coders else []
    data = np.ascontiguousarray(part.symbols).tobytes()
    for coder in (coder for coder in coders if coder != "rans"):
        # Entropy coding is within a promille of what is possible on noise; the slow coders only win on repetition.
        if found and coder != "raw" and len(data) > SAMPLE_BYTES and not _worth_trying(coder, data, found[0]):
            continue
        coded = compress(coder, data)
        found.append(Coded(coder, 0, np.zeros((0, ALPHABET), np.int64), coded, len(coded)))
    return min(found, key=lambda coded: coded.size)


def _worth_trying(coder: str, data: bytes, entropy_coded: Coded) -> bool:
    start = (len(data) - SAMPLE_BYTES) // 2
    sample = compress(coder, data[start : start + SAMPLE_BYTES])
    return len(sample) < entropy_coded.size * SAMPLE_BYTES / len(data)


def _rans(part: Part) -> Coded:
    """As many classes as pay for their tables."""
    fine = histograms(part)
    found = []
    for number in CLASSES if part.classes is not None else (1,):
        counts = fine.reshape(number, -1, ALPHABET).sum(1)
        made = np.stack([frequencies(c) for c in counts])
        bits = sum(code_bits(c, t) for c, t in zip(counts, made, strict=True))
        size = bits / 8 + sum(len(tables.to_bytes(t)) for t in made)
        found.append(Coded("rans", number, made, None, size))
    return min(found, key=lambda coded: coded.size)


def histograms(part: Part) -> np.ndarray:
    """Counts int64 [classes, 256] of a part's symbols; one class if the part has none."""
    if part.classes is None:
        return np.bincount(part.symbols.reshape(-1), minlength=ALPHABET)[None]
    index = part.classes.astype(np.int64)[:, None] * ALPHABET + part.symbols
    return np.bincount(index.reshape(-1), minlength=CLASSES[-1] * ALPHABET).reshape(-1, ALPHABET)


def part_entropy_bits(part: Part) -> float:
    """The order-0 entropy of a part's symbols, all classes together, in bits."""
    return entropy_bits(histograms(part).sum(0))


def _contexts(part: Part, number: int) -> np.ndarray:
    """Which of a part's `number` tables codes each symbol, int32 [rows · columns]."""
    rows, columns = part.symbols.shape
    if part.classes is None or number == 1:
        return np.zeros(rows * columns, np.int32)
    return np.repeat(part.classes.astype(np.int32) * number // CLASSES[-1], columns)


def decode(
    data: bytes, record: dict[str, Any], shapes: Sequence[tuple[int, int]], classes: Sequence[np.ndarray | None]
) -> list[np.ndarray]:
    """The symbols uint8 [rows, columns] of every part that `encode` coded.

    shapes, classes: of each part, known otherwise. Raises ValueError if data and record do not fit them.
    """
    kinds = check_record(record, len(shapes), len(data))
    header, stream, rest = np.split(np.frombuffer(data, np.uint8), np.cumsum([record["tables"], record["stream"]]))
    shared = [i for i, (coder, _) in enumerate(kinds) if coder == "rans"]
    found: dict[int, np.ndarray] = {}
    if shared:
        empty = [Part(np.broadcast_to(np.uint8(0), shapes[i]), classes[i]) for i in shared]
        decoded = _decode_shared(header.tobytes(), stream.tobytes(), empty, [kinds[i][1] for i in shared])
        found.update(zip(shared, decoded, strict=True))
    else:
        require(not len(header) and not len(stream), "a section has a stream that no part uses")
    position = 0
    for i, (coder, size) in enumerate(kinds):
        if coder != "rans":
            plain = decompress(coder, rest[position : position + size].tobytes(), shapes[i][0] * shapes[i][1])
            found[i] = np.frombuffer(plain, np.uint8).reshape(shapes[i])
            position += size
    return [found[i] for i in range(len(shapes))]


def _decode_shared(header: bytes, stream: bytes, parts: Sequence[Part], numbers: list[int]) -> list[np.ndarray]:
    """Undo `_encode_shared`; `parts` have the shapes and classes, `numbers` say how many tables each has."""
    made = tables.from_bytes(inflate(header, 4 * ALPHABET * sum(numbers), "the tables of frequencies"), sum(numbers))
    contexts = [_contexts(part, number) + base for part, number, base in zip(parts, numbers, np.cumsum([0, *numbers]))]
    symbols = rans.decode(stream, np.concatenate(contexts), made)
    split = np.split(symbols, np.cumsum([len(c) for c in contexts])[:-1])
    return [values.reshape(part.symbols.shape) for values, part in zip(split, parts, strict=True)]


def check_record(record: Any, num_parts: int, num_bytes: int) -> list[tuple[str, int]]:
    """The (coder, number) of each part of a record that may come from anywhere. Raises ValueError if it is none."""
    require(isinstance(record, dict) and set(record) == {"tables", "stream", "parts"}, "a section's record is damaged")
    parts = record["parts"]
    require(isinstance(parts, list) and len(parts) == num_parts, f"a section must have {num_parts} parts")
    sizes = [record["tables"], record["stream"]]
    for part in parts:
        require(isinstance(part, list) and len(part) == 2 and type(part[1]) is int, "a part's record is damaged")
        require(part[0] == "rans" or part[0] in CODERS, f"unknown coder {part[0]!r}")
        require(part[0] != "rans" or part[1] in CLASSES, f"a part cannot have {part[1]} classes")
        sizes += [] if part[0] == "rans" else [part[1]]
    require(all(type(size) is int and size >= 0 for size in sizes), "a part's size is negative or no number")
    require(sum(sizes) == num_bytes, f"a section has {num_bytes} bytes, its parts need {sum(sizes)}")
    return [(part[0], part[1]) for part in parts]


def inflate(data: bytes, most: int, what: str) -> bytes:
    """Undo zlib, up to `most` bytes. Raises ValueError if there are more, or the data is damaged."""
    decoder = zlib.decompressobj()
    try:
        found = decoder.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"{what} cannot be unpacked ({error})") from error
    require(decoder.eof and not decoder.unused_data and len(found) <= most, f"{what} are cut short or too large")
    return found
