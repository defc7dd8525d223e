"""An evaluation dealt out: each share scores its part of the targets, and the parts make the whole again."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastweight.configs import require
from fastweight.evaluate.evaluation import Evaluation
from fastweight.evaluate.positions import merge_buckets
from fastweight.evaluate.reading import Reader
from fastweight.learn import Piece, Text


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`. All targets stand in a row, cut into `count` equal parts; what is read at once (a
    document, a window) belongs to the share in whose part its first target stands."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        good = self.count >= 1 and 0 <= self.index < self.count
        require(good, f"score: a share must be (index, count) with 0 <= index < count, got {self.index, self.count}.")

    def texts(self, reader: Reader) -> Iterator[Text]:
        """The documents of this share."""
        return (piece.text for piece in self.pieces(reader, lambda text: [text.whole()]))

    def pieces(self, reader: Reader, cut: Callable[[Text], Iterable[Piece]]) -> Iterator[Piece]:
        """Of what `cut` makes of all documents: the pieces of this share."""
        before = 0
        for text in reader:
            for piece in cut(text):
                if (before + piece.first - 1) * self.count // reader.total == self.index:
                    yield piece
            before += text.num_targets


def merge_evaluations(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation whose shares are `parts`. Its seconds are those of the slowest.

    Raises ValueError if there is none, they were made differently, or no target stands for a byte.
    """
    require(len(parts) > 0, "merge: no part of an evaluation was given.")
    first = parts[0]
    for name in ("context", "memory", "seq_len", "stride", "learning", "documents"):
        found = [getattr(part, name) for part in parts]
        same = all(value == found[0] for value in found)
        require(same, f"merge: the parts are of different evaluations: their {name} are {found}.")
    positions = merge_buckets(part.positions for part in parts)
    merged = replace(
        first,
        **{name: sum(getattr(part, name) for part in parts) for name in ("tokens", "bytes", "forwarded_tokens")},
        nats=math.fsum(bucket.nats for bucket in positions),
        seconds=max(part.seconds for part in parts),
        positions=positions,
        lengths=merge_buckets(part.lengths for part in parts),
        faults=tuple(fault for part in parts for fault in part.faults),
    )
    require(merged.bytes > 0, "nothing to score: the documents hold no target that stands for a byte.")
    return merged
