"""Whole documents end to end in one row, told apart by cu_seqlens: bins, and single documents for scoring."""

import bisect

import numpy as np
import torch

from fastweight.data.batches import IGNORED, Batch
from fastweight.data.store import Split
from fastweight.data.views import (
    as_batch,
    checked_numbers,
    dense_batch,
    empty_weights,
    fill_row,
    need_positive,
    need_samples,
)


class Documents:
    """For scoring: sample i is a whole document, so every target is asked for exactly once and from a fresh state.

    Packed [1, total] with cu_seqlens. Documents without any token after their start are left out.
    """

    lanes = None
    ordered = False

    def __init__(self, split: Split) -> None:
        self.split = split
        lengths = split.document_ends - split.document_starts - 1
        self._starts, self._lengths = split.document_starts[lengths > 0], lengths[lengths > 0]
        need_samples(self, "scoring needs a document")

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)]: targets of each document."""
        return self._lengths

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """Return these documents (numbers below len(self)) as one packed batch."""
        numbers = checked_numbers(sample_numbers, len(self))
        return packed_batch(self.split, self._starts[numbers], self._lengths[numbers])


class Bins:
    """Whole documents packed into bins of at most `seq_len` tokens; sample i is bin i. Packed [1, total], no padding.

    A document longer than seq_len is cut into pieces that each start fresh; no target is lost at a cut. align: every
    piece begins at a multiple of so many tokens; what is missing to it is filled with tokens that ask for nothing and
    belong to the piece before, which they cannot change (a memory that learns chunk by chunk then never meets two
    documents in one chunk, and shapes repeat more often). Bins are filled
    best-fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"), once, from the lengths alone, so that
    every bin is known before the first step.
    """

    lanes = None
    ordered = False

    def __init__(self, split: Split, seq_len: int, align: int = 1) -> None:
        need_positive("Bins: seq_len", seq_len)
        need_positive("Bins: align", align)
        if seq_len % align:
            raise ValueError(f"Bins: align must divide seq_len {seq_len}, got {align}.")
        self.split, self.seq_len, self.align = split, seq_len, align
        self._starts, self._lengths = document_pieces(split, seq_len)[:2]
        bins = best_fit_decreasing(-(-self._lengths // align) * align, seq_len)
        self._order = np.argsort(bins, kind="stable")
        self._bounds = np.searchsorted(bins[self._order], np.arange(int(bins.max(initial=-1)) + 2))
        need_samples(self, "a bin needs a document")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @property
    def efficiency(self) -> float:
        """Tokens in all bins, as a fraction of what the bins could hold."""
        return float(self._lengths.sum() / (len(self) * self.seq_len))

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """Return these bins (numbers below len(self)), one after the other, as one packed batch."""
        numbers = checked_numbers(sample_numbers, len(self)).tolist()
        pieces = np.concatenate([self._order[self._bounds[i] : self._bounds[i + 1]] for i in numbers])
        return packed_batch(self.split, self._starts[pieces], self._lengths[pieces], self.align)


class LongDocuments:
    """For contexts longer than most documents: only those of at least `min_tokens` targets, never two in a row.

    A document is cut into rows of seq_len that each start fresh; a last row shorter than min_tokens is left out.
    Dense [B, T], a shorter row filled up with ignored targets. min_tokens: seq_len if None.
    """

    lanes = None
    ordered = False

    def __init__(self, split: Split, seq_len: int, min_tokens: int | None = None) -> None:
        need_positive("LongDocuments: seq_len", seq_len)
        least = seq_len if min_tokens is None else min_tokens
        need_positive("LongDocuments: min_tokens", least)
        if least > seq_len:
            raise ValueError(f"LongDocuments: min_tokens {least} is more than a row of seq_len {seq_len} can hold.")
        self.split, self.seq_len, self.min_tokens = split, seq_len, least
        starts, lengths, _ = document_pieces(split, seq_len)
        self._starts, self._lengths = starts[lengths >= least], lengths[lengths >= least]
        longest = int((split.document_ends - split.document_starts).max(initial=1)) - 1
        need_samples(self, f"no document has {least} targets, the longest has {longest}; use a smaller min_tokens")

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """Return the rows with these numbers (below len(self)) as a dense batch."""
        numbers = checked_numbers(sample_numbers, len(self))
        return dense_batch(self.split, self._starts[numbers], self._lengths[numbers], self.seq_len)


def document_pieces(split: Split, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut every document into pieces of at most `seq_len` targets.

    Returns starts, lengths (each int64 [pieces], in document order) and the number of pieces of each document.
    """
    targets = split.document_ends - split.document_starts - 1
    counts = -(-targets // seq_len)
    document = np.repeat(np.arange(len(counts)), counts)
    offsets = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * seq_len
    return split.document_starts[document] + offsets, np.minimum(seq_len, targets[document] - offsets), counts


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each item (int64, bins numbered from 0): longest first, each into the fullest bin with room."""
    bins = np.empty(len(lengths), dtype=np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    num_bins = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room, num_bins = num_bins, capacity, num_bins + 1
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        bins[item] = chosen
        if left := room - length:
            if not by_room.setdefault(left, []):
                bisect.insort(rooms, left)
            by_room[left].append(chosen)
    return bins


def packed_batch(split: Split, starts: np.ndarray, lengths: np.ndarray, align: int = 1) -> Batch:
    """Put lengths[n] tokens from starts[n], n = 0..N-1, end to end into one row with cu_seqlens [N+1].

    align: each begins at a multiple of so many tokens; document starts that ask for nothing fill the gaps.
    """
    bounds = np.concatenate([[0], np.cumsum(-(-lengths // align) * align)])
    tokens = np.full((1, int(bounds[-1])), split.bos_id, dtype=np.int64)
    targets, num_bytes = np.full_like(tokens, IGNORED), np.zeros_like(tokens)
    weights = empty_weights(split, tokens)
    for start, length, low in zip(starts.tolist(), lengths.tolist(), bounds[:-1].tolist(), strict=True):
        row = slice(low, low + length)
        own = None if weights is None else weights[0, row]
        fill_row(split, start, length, tokens[0, row], targets[0, row], num_bytes[0, row], own)
    return as_batch(tokens, targets, num_bytes, weights, cu_seqlens=torch.from_numpy(bounds.astype(np.int32)))
