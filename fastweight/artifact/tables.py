"""Histograms as tables of whole frequencies, and the bytes that such tables take in a file."""

import numpy as np

from fastweight.configs import require

PRECISION = 14  # frequencies of a table sum to 2^14
TOTAL = 1 << PRECISION
ALPHABET = 256


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Whole frequencies int64 [256] that sum to 2^14, at least 1 for every symbol that occurs; all 0 for no symbol.

    counts: int [256]. Starting from the rounded shares, the step up or down that costs the fewest bits is taken until
    the sum is right.
    """
    counts = counts.astype(np.int64)
    total = int(counts.sum())
    if total == 0:
        return np.zeros(ALPHABET, np.int64)
    used = counts > 0
    found = np.where(used, np.maximum(1, np.rint(counts * (TOTAL / total))), 0).astype(np.int64)
    while (missing := TOTAL - int(found.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = used & (found + step > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(movable, counts * np.log2((found + step) / found), -np.inf)
        found[int(np.argmax(gain))] += step
    return found


def code_bits(counts: np.ndarray, table: np.ndarray) -> float:
    """The bits that symbols with `counts` take under `table`."""
    used = counts > 0
    return float((counts[used] * (PRECISION - np.log2(table[used]))).sum())


def entropy_bits(counts: np.ndarray) -> float:
    """The bits that symbols with `counts` take at their entropy."""
    counts = counts[counts > 0].astype(np.float64)
    return float((counts * np.log2(counts.sum() / counts)).sum())


def to_bytes(table: np.ndarray) -> bytes:
    """First used symbol, number of entries − 1, then each frequency as a varint; three zero bytes for no symbol."""
    used = np.flatnonzero(table)
    if not len(used):
        return bytes([0, 0, 0])
    first, last = int(used[0]), int(used[-1])
    out = bytearray([first, last - first])
    for value in table[first : last + 1].tolist():
        while value >= 0x80:
            out.append(0x80 | (value & 0x7F))
            value >>= 7
        out.append(value)
    return bytes(out)


def from_bytes(data: bytes, number: int) -> np.ndarray:
    """`number` tables int64 [number, 256] from their bytes. Raises ValueError if they are not tables."""
    found, position = np.zeros((number, ALPHABET), np.int64), 0
    for table in found:
        require(position + 2 <= len(data), "the tables of frequencies end too early")
        first, entries = data[position], data[position + 1] + 1
        require(first + entries <= ALPHABET, "a table of frequencies goes past symbol 255")
        position += 2
        for symbol in range(first, first + entries):
            table[symbol], position = _varint(data, position)
        total = int(table.sum())
        require(total == TOTAL or (total == 0 and entries == 1), f"a table's frequencies sum to {total}, not {TOTAL}")
    require(position == len(data), "there are bytes after the last table of frequencies")
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        require(position < len(data) and shift < 21, "a frequency is cut off or too large")
        byte = data[position]
        value, position = value | (byte & 0x7F) << shift, position + 1
        if byte < 0x80:
            return value, position
        shift += 7
