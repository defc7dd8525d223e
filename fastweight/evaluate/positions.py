"""Sums of losses by position: where in its document a token stands decides how much memory can help."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastweight.configs import require

# Bounds 1, 2, 3, 4, 6, 8, 12, 16, ...: two buckets per doubling, enough for 2^40 tokens.
_LOG_STARTS = np.array(sorted({max(1, (2 + half) * 2**octave // 2) for octave in range(41) for half in (0, 1)}))


@dataclass(frozen=True, kw_only=True)
class PositionBucket:
    """Targets with start ≤ position < stop, where position is the number of tokens before the target."""

    start: int
    stop: int
    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte; None where the targets stand for no byte."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else None

    @property
    def center(self) -> float:
        """The middle of the positions, where the bucket is drawn."""
        return (self.start + self.stop - 1) / 2

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, derived figures included."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return data | {"nats_per_token": self.nats / self.tokens, "bits_per_byte": self.bits_per_byte}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "PositionBucket":
        """Undo `to_dict`."""
        return PositionBucket(**{name: data[name] for name in PositionBucket.__dataclass_fields__})


def merge_buckets(parts: Iterable[Sequence[PositionBucket]]) -> tuple[PositionBucket, ...]:
    """The sums of several lists of buckets, bucket by bucket; all must have been made with the same width."""
    held: dict[tuple[int, int], list[PositionBucket]] = {}
    for bucket in (bucket for part in parts for bucket in part):
        held.setdefault((bucket.start, bucket.stop), []).append(bucket)
    return tuple(
        PositionBucket(
            start=start, stop=stop, nats=math.fsum(b.nats for b in found), tokens=sum(b.tokens for b in found),
            bytes=sum(b.bytes for b in found),
        )
        for (start, stop), found in sorted(held.items())
    )  # fmt: skip


class PositionSums:
    """float64 sums of losses, counts of tokens and bytes, in buckets of positions (width None: logarithmic)."""

    def __init__(self, width: int | None = None):
        require(width is None or width >= 1, f"bucket_width must be at least 1 token or None, got {width}.")
        self.width = width
        self._sums = np.zeros((0, 3))  # nats, tokens, bytes of each bucket; float64 counts exactly up to 2^53

    @property
    def nats(self) -> float:
        return math.fsum(self._sums[:, 0])

    @property
    def tokens(self) -> int:
        return int(self._sums[:, 1].sum())

    @property
    def bytes(self) -> int:
        return int(self._sums[:, 2].sum())

    def add(self, positions: np.ndarray, nats: np.ndarray, num_bytes: np.ndarray) -> None:
        """Add one entry per target, all [n]; positions ≥ 1."""
        index = self._index(positions)
        size = max(len(self._sums), int(index.max()) + 1)
        self._sums = np.pad(self._sums, ((0, size - len(self._sums)), (0, 0)))
        for column, values in enumerate((nats, np.ones(len(index)), num_bytes)):
            self._sums[:, column] += np.bincount(index, values, size)

    def buckets(self) -> tuple[PositionBucket, ...]:
        """The buckets that hold a target, in order."""
        found = []
        for i, (nats, tokens, num_bytes) in enumerate(self._sums.tolist()):
            start, stop = self._bounds(i)
            if tokens:
                counts = {"tokens": int(tokens), "bytes": int(num_bytes)}
                found.append(PositionBucket(start=start, stop=stop, nats=nats, **counts))
        return tuple(found)

    def _index(self, positions: np.ndarray) -> np.ndarray:
        if self.width is None:
            return np.searchsorted(_LOG_STARTS, positions, side="right") - 1
        return (positions - 1) // self.width

    def _bounds(self, index: int) -> tuple[int, int]:
        if self.width is None:
            return int(_LOG_STARTS[index]), int(_LOG_STARTS[index + 1])
        return 1 + index * self.width, 1 + (index + 1) * self.width
