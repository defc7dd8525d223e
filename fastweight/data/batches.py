"""A batch: tokens in, targets out, and the UTF-8 bytes that each target stands for."""

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastweight.data.sampler import Sampler

IGNORED = -100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a model reads and what it should have said.

    tokens: int64 [B, T]. targets: int64 [B, T], the token after each token, -100 where nothing is asked (a document
    start is predicted by nobody). target_bytes: int64 [B, T], UTF-8 bytes of each target, 0 where ignored.
    cu_seqlens: int32 [N+1]; then B = 1 and row 0 is N documents end to end, n at cu_seqlens[n]:cu_seqlens[n+1].
    weights: float32 [B, T], how much each target counts in the mean loss, None: all the same. 0 where ignored.
    continues: bool [B], row b goes on where row b of the batch before stopped (carry its state), else it starts fresh.
    """

    tokens: Tensor
    targets: Tensor
    target_bytes: Tensor
    weights: Tensor | None = None
    cu_seqlens: Tensor | None = None
    continues: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Return the batch on `device`, cu_seqlens excepted: lengths decide on shapes, so they stay with the host."""
        fields = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        moved = {
            name: x if name == "cu_seqlens" else x.to(device, non_blocking=non_blocking)
            for name, x in fields
            if x is not None
        }
        return Batch(**moved)

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU copies without stopping the host."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: x.pin_memory() for name, x in fields.items() if x is not None})

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence: what variable-length attention wants beside cu_seqlens."""
        return self.tokens.shape[1] if self.cu_seqlens is None else int(self.cu_seqlens.diff().max())

    @property
    def num_targets(self) -> int:
        """How many targets are asked for."""
        return int((self.targets != IGNORED).sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all targets."""
        return int(self.target_bytes.sum())


def targets_ahead(batch: Batch, ahead: int) -> Tensor:
    """The token `ahead` places after each target, int64 [B, T]; 0 gives the targets themselves.

    Ignored where the row or packed sequence ends before, or a target on the way is ignored: beyond a document's start
    nothing is asked.
    """
    stops = batch.targets == IGNORED
    stops[:, -1] = True
    if batch.cu_seqlens is not None:
        stops[0, batch.cu_seqlens[1:].long() - 1] = True
    found = batch.targets
    for _ in range(ahead):
        found = found.roll(-1, 1).masked_fill(stops, IGNORED)
    return found


def weights_ahead(batch: Batch, ahead: int) -> Tensor | None:
    """The weights of `targets_ahead`, float32 [B, T]; they count only where these are not ignored."""
    return None if batch.weights is None else batch.weights.roll(-ahead, 1)


def check_batch(batch: Batch, vocab_size: int) -> None:
    """Raise ValueError that names what is wrong with `batch` for a model of `vocab_size`."""
    for name in ("tokens", "targets", "target_bytes"):
        tensor = getattr(batch, name)
        if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape != batch.tokens.shape:
            raise ValueError(
                f"Batch: {name} is {tensor.dtype} {list(tensor.shape)}, int64 [B, T] like tokens is needed "
                f"(tokens: {list(batch.tokens.shape)})."
            )
    asked = batch.targets[batch.targets != IGNORED]
    for name, ids in {"tokens": batch.tokens, "targets": asked}.items():
        if ids.numel() and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ValueError(
                f"Batch: {name} must lie in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}. "
                "Was the store made with the tokenizer of this model?"
            )
    if (batch.target_bytes < 0).any() or batch.target_bytes[batch.targets == IGNORED].any():
        raise ValueError("Batch: target_bytes must be 0 where the target is ignored and never negative.")
    weights = batch.weights
    if weights is not None and (weights.dtype != torch.float32 or weights.shape != batch.tokens.shape):
        raise ValueError(
            f"Batch: weights is {weights.dtype} {list(weights.shape)}, float32 {list(batch.tokens.shape)} is needed."
        )
    if weights is not None and not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError("Batch: weights must be finite and not negative.")
    _check_rows(batch)


def _check_rows(batch: Batch) -> None:
    rows, length = batch.tokens.shape
    if (cu := batch.cu_seqlens) is not None:
        rises = cu.ndim == 1 and len(cu) >= 2 and bool((cu.diff() > 0).all())
        if rows != 1 or cu.dtype != torch.int32 or not rises or int(cu[0]) != 0 or int(cu[-1]) != length:
            raise ValueError(
                f"Batch: cu_seqlens must be int32, rise from 0 to T = {length}, and come with B = 1; "
                f"got {cu.dtype} {cu.tolist()[:8]}... with B = {rows}."
            )
    if (goes_on := batch.continues) is not None and (goes_on.dtype != torch.bool or goes_on.shape != (rows,)):
        raise ValueError(f"Batch: continues is {goes_on.dtype} {list(goes_on.shape)}, bool [{rows}] is needed.")


class View(Protocol):
    """A way to cut a split into samples. len: samples per epoch.

    lanes: rows per batch if it fixes them, else None. ordered: sample numbers go on without end in an order of its own.
    """

    @property
    def lanes(self) -> int | None: ...
    @property
    def ordered(self) -> bool: ...
    def __len__(self) -> int: ...
    def batch(self, sample_numbers: np.ndarray) -> Batch: ...


def loader(
    view: View, batch_size: int, seed: int = 0, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield this rank's part of global batch start_step, start_step + 1, ... without end.

    batch_size: samples of the global batch; rank r takes the r-th of `world_size` equal slices, so the global batch is
    the same for any number of ranks. Batch number n depends on (view, batch_size, seed) alone: resume is `start_step`.
    An ordered view fixes the order itself and `seed` is not used here; with lanes, batch_size must be their number.
    Raises ValueError at the call if the sizes do not fit.
    """
    _check_sizes(view, batch_size, start_step, rank, world_size)
    sampler = None if view.ordered else Sampler(len(view), seed)
    share = batch_size // world_size

    def batches(step: int) -> Iterator[Batch]:
        while True:
            first = step * batch_size + rank * share
            numbers = np.arange(first, first + share)
            yield view.batch(numbers if sampler is None else sampler.locate(numbers)[1])
            step += 1

    return batches(start_step)


def read_once(view: View, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Yield every sample of one epoch exactly once, in order; the last batch may be smaller, or empty and left out."""
    _check_sizes(view, batch_size, 0, rank, world_size)
    share = batch_size // world_size

    def batches() -> Iterator[Batch]:
        for first in range(rank * share, len(view), batch_size):
            yield view.batch(np.arange(first, min(first + share, len(view))))

    return batches()


def _check_sizes(view: View, batch_size: int, start_step: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or world_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size must be a positive multiple of world_size, got {batch_size} and {world_size}.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}.")
    if start_step < 0:
        raise ValueError(f"start_step counts from 0, got {start_step}.")
    if view.lanes is not None and batch_size != view.lanes:
        raise ValueError(f"batch_size must be the {view.lanes} lanes of the view, got {batch_size}.")
