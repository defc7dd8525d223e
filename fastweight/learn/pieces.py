"""What is read at once: documents and pieces of documents."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """One document: its number, tokens [length] and the bytes of each; targets are tokens[1:]."""

    index: int
    tokens: Tensor
    num_bytes: np.ndarray

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    def whole(self, start: int = 0) -> "Piece":
        """All inputs from `start` on, all of whose targets are scored."""
        return Piece(self, start, self.num_targets, start + 1)

    def first_piece(self, seq_len: int) -> "Piece":
        """The first seq_len inputs, all of whose targets are scored."""
        return Piece(self, 0, min(seq_len, self.num_targets), 1)

    def until(self, position: int) -> "Text":
        """The document up to and with the token at `position`."""
        return replace(self, tokens=self.tokens[: position + 1], num_bytes=self.num_bytes[: position + 1])


@dataclass(frozen=True)
class Piece:
    """Inputs text.tokens[start:stop]; the targets at positions first..stop (start < first) are scored."""

    text: Text
    start: int
    stop: int
    first: int

    @property
    def num_inputs(self) -> int:
        return self.stop - self.start

    @property
    def num_targets(self) -> int:
        """Targets that are scored."""
        return self.stop - self.first + 1

    @property
    def is_last(self) -> bool:
        return self.stop == self.text.num_targets

    def next_piece(self, seq_len: int) -> "Piece":
        """The seq_len inputs that follow."""
        return Piece(self.text, self.stop, min(self.stop + seq_len, self.text.num_targets), self.stop + 1)

    def with_context(self, num_inputs: int) -> "Piece":
        """The same targets, read from at most `num_inputs` inputs that end with theirs."""
        return replace(self, start=max(0, min(self.stop - num_inputs, self.first - 1)))


def windows(text: Text, seq_len: int, stride: int) -> Iterator[Piece]:
    """The first window scores all it reads: its targets have their whole past in view. Each later one adds `stride`."""
    piece = text.first_piece(seq_len)
    yield piece
    stop = piece.stop
    while stop < text.num_targets:
        first, stop = stop + 1, min(stop + stride, text.num_targets)
        yield Piece(text, stop - seq_len, stop, first)


def batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """`size` pieces at a time, fewer at the end."""
    left = iter(pieces)
    while batch := list(islice(left, size)):
        yield batch
