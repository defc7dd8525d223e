"""Ways to cut a split into samples: fixed windows over the whole sequence, bins of whole documents, documents."""

import numpy as np
import torch

from fastweight.data.batches import IGNORED, Batch
from fastweight.data.store import Split


class Windows:
    """Concatenate and split: sample i is tokens i*T .. i*T+T with the tokens one later as targets. Dense [B, T].

    Documents run into each other inside a window; the tail that fills no window is left out.
    """

    lanes = None
    ordered = False

    def __init__(self, split: Split, seq_len: int) -> None:
        need_positive("Windows: seq_len", seq_len)
        self.split, self.seq_len = split, seq_len
        self._length = max(0, split.num_tokens - 1) // seq_len
        need_samples(self, f"a window of {seq_len} needs {seq_len + 1} tokens")

    def __len__(self) -> int:
        return self._length

    def batch(self, sample_numbers: np.ndarray) -> Batch:
        """Return the windows with these numbers (each below len(self)) as a dense batch."""
        starts = checked_numbers(sample_numbers, len(self)) * self.seq_len
        return dense_batch(self.split, starts, np.full_like(starts, self.seq_len), self.seq_len)


def need_positive(what: str, value: int) -> None:
    """Raise ValueError unless value >= 1."""
    if value < 1:
        raise ValueError(f"{what} must be at least 1, got {value}.")


def need_samples(view, why: str) -> None:
    """Raise ValueError if the view of a split has no sample."""
    if not len(view):
        raise ValueError(
            f"{type(view).__name__}: split {view.split.name!r} has {view.split.num_tokens} tokens in "
            f"{view.split.num_documents} documents; {why}. Prepare more text (or a larger heldout_fraction)."
        )


def checked_numbers(sample_numbers: np.ndarray, length: int) -> np.ndarray:
    """Return sample numbers as int64 [n]; raise IndexError if one is outside range(length)."""
    numbers = np.asarray(sample_numbers, dtype=np.int64).reshape(-1)
    if not numbers.size or numbers.min() < 0 or numbers.max() >= length:
        raise IndexError(f"sample numbers must lie in 0..{length - 1} and be at least one, got {numbers[:8].tolist()}.")
    return numbers


def dense_batch(split: Split, starts: np.ndarray, lengths: np.ndarray, seq_len: int, **fields: torch.Tensor) -> Batch:
    """Row b reads lengths[b] <= seq_len tokens from starts[b]; the rest of the row is padding that asks for nothing."""
    tokens = np.full((len(starts), seq_len), split.bos_id, dtype=np.int64)
    targets = np.full_like(tokens, IGNORED)
    num_bytes, weights = np.zeros_like(tokens), empty_weights(split, tokens)
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
        fill_row(split, start, length, tokens[b], targets[b], num_bytes[b], None if weights is None else weights[b])
    return as_batch(tokens, targets, num_bytes, weights, **fields)


def empty_weights(split: Split, tokens: np.ndarray) -> np.ndarray | None:
    """Zeros float32 [B, T] to be filled, None for a split without weights."""
    return np.zeros(tokens.shape, dtype=np.float32) if split.has_weights else None


def as_batch(
    tokens: np.ndarray, targets: np.ndarray, num_bytes: np.ndarray, weights: np.ndarray | None, **fields: torch.Tensor
) -> Batch:
    """The arrays [B, T] of filled rows as a batch."""
    named = {"tokens": tokens, "targets": targets, "target_bytes": num_bytes, "weights": weights}
    return Batch(**{name: torch.from_numpy(a) for name, a in named.items() if a is not None}, **fields)


def fill_row(
    split: Split, start: int, length: int, tokens: np.ndarray, targets: np.ndarray, num_bytes: np.ndarray,
    weights: np.ndarray | None,
) -> None:  # fmt: skip
    """Write tokens start .. start+length and their targets; targets that are document starts are ignored, 0 bytes."""
    if not length:
        return
    ids = split.tokens(start, start + length + 1)
    tokens[:length], targets[:length] = ids[:-1], ids[1:]
    num_bytes[:length] = split.token_bytes(start + 1, start + length + 1)
    first, last = np.searchsorted(split.document_starts, (start + 1, start + length + 1))
    heads = split.document_starts[first:last] - (start + 1)
    targets[heads] = IGNORED
    if weights is not None:
        weights[:length] = split.weights(start + 1, start + length + 1)
        weights[heads] = 0
