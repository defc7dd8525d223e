"""Sequences of different lengths and phases, cut into chunks that can be processed together.

A batch [B, T] and a packed row [1, total] with `cu_seqlens` are the same thing here: N sequences with lengths and
starts in one flat run of tokens. A chunk plan places them on a grid of chunks, ordered by chunk number first and by
sequence second, longest sequence first, so that the sequences still running at chunk i are a prefix of the rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.state import Faults

INTEGERS = (torch.int64, torch.int32)  # dtypes of tokens and offsets


def check_packing(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """`check_cu_seqlens` for the input x [B, T, ...] of an op: a GPU, and a graph, would have to wait for a look."""
    if cu_seqlens is not None:
        on_host = isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu"
        check_cu_seqlens(cu_seqlens, x.shape[1], x.shape[0], look=on_host and not torch.compiler.is_compiling())


def check_cu_seqlens(cu_seqlens: Tensor, total: int, batch: int, *, look: bool = True) -> None:
    """Refuse offsets that do not describe the packed row: integer [N+1], from 0 to `total`, strictly increasing.

    look: at the numbers, too.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a packed input of batch 1, got batch {batch}. Flatten it to [1, total].")
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of integers [N + 1], got a {type(cu_seqlens).__name__}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in INTEGERS:
        got = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be integers of shape [N + 1] with N >= 1, got {got}.")
    if not look:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(b <= a for a, b in zip(ends, ends[1:], strict=False)):
        shown = ends if len(ends) <= 8 else [*ends[:4], "...", *ends[-3:]]
        raise ValueError(f"cu_seqlens must start at 0, increase, and end at the number of tokens {total}; got {shown}.")


def sequence_lengths(batch: int, num_tokens: int, cu_seqlens: Tensor | None) -> list[int]:
    """Length of each sequence of a [batch, num_tokens] input."""
    if cu_seqlens is None:
        return [num_tokens] * batch
    ends = cu_seqlens.tolist()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def token_positions(position: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """Absolute position of every token: [B, T], or [1, total] for a packed row. position: [N], tokens read before."""
    steps = torch.arange(num_tokens, device=position.device)
    if cu_seqlens is None:
        return position[:, None] + steps
    starts = cu_seqlens.to(position.device, torch.int64)
    owner = torch.searchsorted(starts[1:], steps, right=True)
    return (position[owner] + steps - starts[owner])[None]


def advance(position: Tensor, num_tokens: int, cu_seqlens: Tensor | None) -> Tensor:
    """Positions after reading the input: [N]."""
    if cu_seqlens is None:
        return position + num_tokens
    return position + cu_seqlens.diff().to(position)


def recording(t: Tensor) -> bool:
    """Whether the work on `t` is recorded now, to be replayed: nobody may look at numbers then.

    Who records a step has made sure that no memory acts in it beyond taking the token in (fastweight.stepping).
    """
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


_in_place: ContextVar[bool] = ContextVar("in_place", default=False)


@contextmanager
def in_place() -> Iterator[None]:
    """States read meanwhile belong to the caller alone, who lets ops write into them what comes after."""
    token = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(token)


def may_overwrite() -> bool:
    """Whether an op may return the buffers that it was given, changed; elsewhere a state is a value."""
    return _in_place.get()


def rows_due(due: Tensor) -> Tensor:
    """Indices of the rows where `due` [N] is true, for a branch on the host; none while a step is recorded."""
    if recording(due):
        return torch.empty(0, dtype=torch.int64, device=due.device)
    return due.nonzero().flatten()


def count_faults(faults: Faults, bad: Tensor, position: Tensor, cu_seqlens: Tensor | None) -> Faults:
    """Add the tokens marked in `bad` [B, T] (or [1, total]) to each sequence's faults."""
    where = token_positions(position, bad.shape[1], cu_seqlens)
    far = torch.iinfo(torch.int64).max
    at = torch.where(bad, where, torch.full_like(where, far))
    if cu_seqlens is None:
        return faults.add(bad.sum(1), at.amin(1))
    starts = cu_seqlens.to(bad.device, torch.int64)
    owner = torch.searchsorted(starts[1:], torch.arange(bad.shape[1], device=bad.device), right=True)
    count = torch.zeros_like(faults.count).index_add(0, owner, bad[0].long())
    return faults.add(count, torch.full_like(faults.first, far).scatter_reduce(0, owner, at[0], "amin"))


class ChunkPlan(NamedTuple):
    """Where each token stands on the grid of chunks.

    chunk_size: slots per chunk. order: [N], the sequence of each row, longest first; rank: its inverse.
    active: rows that have chunk i, for each i (non-increasing). complete: per chunk i, how many of its rows fill the
    chunk's last slot, as a bool mask [active[i]] or None if all do.
    source: [chunks, chunk_size], flat index of the token in each slot, or of the zero row behind all tokens.
    slot: [total], flat slot of each token. num_sources: number of rows that `source` may point to.
    dense: all sequences are as long, whole chunks; the grid is a plain reshape of their tokens.
    """

    chunk_size: int
    order: Tensor
    rank: Tensor
    active: list[int]
    complete: list[Tensor | None]
    source: Tensor
    slot: Tensor
    num_sources: int
    dense: bool

    def gather(self, tokens: Tensor, pending: Tensor | None = None) -> Tensor:
        """[B, T, ...] → [chunks, chunk_size, ...], zero in empty slots.

        pending: [N, chunk_size, ...], tokens kept from before, if the plan was made with `with_pending`.
        """
        if self.dense and pending is None:
            sequences = len(self.order)  # packed or not: tokens of a sequence follow each other
            if sequences == 1:
                return tokens.reshape(-1, self.chunk_size, *tokens.shape[2:])
            grid = tokens.reshape(sequences, -1, self.chunk_size, *tokens.shape[2:])
            return grid.transpose(0, 1).flatten(0, 1)
        rows = [tokens.flatten(0, 1)] + ([] if pending is None else [pending.flatten(0, 1).to(tokens.dtype)])
        rows.append(tokens.new_zeros(1, *tokens.shape[2:]))
        flat = torch.cat(rows).index_select(0, self.source.flatten())
        return flat.unflatten(0, self.source.shape)

    def scatter(self, chunks: Tensor, batch: int) -> Tensor:
        """[chunks, chunk_size, ...] → [batch, T, ...]: the tokens back in their places."""
        if self.dense and len(self.order) == 1:
            return chunks.reshape(1, -1, *chunks.shape[2:])
        if self.dense:
            grid = chunks.unflatten(0, (-1, len(self.order))).transpose(0, 1)
            return grid.reshape(batch, -1, *chunks.shape[2:])
        flat = chunks.flatten(0, 1).index_select(0, self.slot)
        return flat.unflatten(0, (batch, -1))

    def split(self, chunks: Tensor) -> tuple[Tensor, ...]:
        """[chunks, ...] → one [active[i], ...] per chunk number i."""
        return chunks.split(self.active)


def plan_chunks(
    lengths: Sequence[int], phases: Sequence[int], chunk_size: int, device: torch.device, *, with_pending: bool = False
) -> ChunkPlan:
    """Lay out sequences of `lengths` tokens whose first chunk already holds `phases` tokens from before.

    with_pending: those earlier tokens are available as an [N, chunk_size, ...] buffer and are gathered too (their slots
    are filled, phases up to chunk_size); otherwise their slots stay empty.
    """
    n, total = len(lengths), sum(lengths)
    extents = torch.tensor([p + t for p, t in zip(phases, lengths, strict=True)])
    counts = (extents + chunk_size - 1) // chunk_size
    order = torch.argsort(counts, descending=True, stable=True)
    active = [int((counts > i).sum()) for i in range(int(counts.max()))]
    complete = []
    for i, rows in enumerate(active):
        full = extents[order[:rows]] >= (i + 1) * chunk_size
        complete.append(None if bool(full.all()) else full.to(device))
    num_sources = total + (n * chunk_size if with_pending else 0)
    source, slot = _place(torch.tensor(lengths), torch.tensor(phases), order, active, chunk_size, with_pending)
    dense = not any(phases) and len(set(lengths)) == 1 and lengths[0] % chunk_size == 0
    rank = torch.empty_like(order)
    rank[order] = torch.arange(n)
    return ChunkPlan(
        chunk_size, order.to(device), rank.to(device), active, complete, source.to(device), slot.to(device),
        num_sources, dense,
    )  # fmt: skip


def _place(
    lengths: Tensor, phases: Tensor, order: Tensor, active: list[int], chunk_size: int, with_pending: bool
) -> tuple[Tensor, Tensor]:
    """The plan's `source` and `slot` tables."""
    n, total = len(lengths), int(lengths.sum())
    starts = lengths.cumsum(0) - lengths
    number = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(active))
    row = torch.cat([order[:rows] for rows in active])
    index = number[:, None] * chunk_size + torch.arange(chunk_size) - phases[row][:, None]
    inside = (index >= 0) & (index < lengths[row][:, None])
    empty = total + (n * chunk_size if with_pending else 0)
    source = torch.where(inside, starts[row][:, None] + index, empty)
    if with_pending:
        before = (index < 0) & (number == 0)[:, None]
        kept = total + row[:, None] * chunk_size + torch.arange(chunk_size)
        # A full pending buffer (phase = chunk_size) is chunk 0 itself; its slots all lie before the new tokens.
        source = torch.where(before, kept, source)
    slot = torch.empty(total, dtype=torch.int64)
    flat, filled = source.flatten(), inside.flatten()
    slot[flat[filled]] = torch.arange(flat.numel())[filled]
    return source, slot
