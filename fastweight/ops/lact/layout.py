"""From the op's tokens and states to the unit's grid of chunks and flat memory, and back."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import LactMemory, LactPending, LactWeights, num_pending
from fastweight.ops.lact.forward import Memory
from fastweight.ops.sequences import ChunkPlan, plan_chunks
from fastweight.state import Faults, map_tensors, zip_tensors

DENSE_LAYOUTS = 64  # whose tensors are kept: those of a batch serve all its layers


class Layout(NamedTuple):
    """plan: where the tokens stand. pending: whether tokens of the state are on the grid, too. started: [N], position
    of the first slot; 0 in a dense plan. length: new tokens of each sequence, [N] or one number. due: [R] bool, whether
    another chunk of the same sequence follows chunk r. row, number: [R], whose chunk it is (in the plan's order), and
    which. last: [N], the chunk that holds each sequence's last token.
    """

    plan: ChunkPlan
    pending: bool
    started: Tensor
    length: Tensor | int
    due: Tensor
    row: Tensor
    number: Tensor
    last: Tensor

    def gather(self, tokens: Tensor, pending: Tensor | None) -> Tensor:
        """[B, T, ...] → [R, C, ...]."""
        return self.plan.gather(tokens, pending if self.pending else None)


def lay_out(
    position: Tensor, lengths: Sequence[int], at: Sequence[int] | None, chunk_size: int, *, fresh: bool = False
) -> Layout:
    """position: [N], tokens read before; at: the same where the host knows them, else all lengths must be equal.
    fresh: all positions are 0, whether the host knows them or not."""
    whole = len(set(lengths)) == 1 and lengths[0] % chunk_size == 0
    if whole and (fresh or (at is not None and not any(at))):
        # What is traced is made anew, by the graph.
        make = _new_dense if torch.compiler.is_compiling() else _dense
        return make(position.device, len(lengths), lengths[0], chunk_size)
    if at is None:
        return _unknown(position, len(lengths), lengths[0], chunk_size)
    held, device = [(p - 1) % chunk_size + 1 if p > 0 else 0 for p in at], position.device
    plan = plan_chunks(lengths, held, chunk_size, device, with_pending=any(held))
    active = torch.tensor(plan.active)
    row = torch.cat([torch.arange(rows) for rows in plan.active])
    number = torch.repeat_interleave(active)
    due = torch.cat([torch.arange(a) < b for a, b in zip(plan.active, [*plan.active[1:], 0], strict=True)])
    rank = plan.rank.cpu()
    final = (active[None] > rank[:, None]).sum(1) - 1
    last = (active.cumsum(0) - active)[final] + rank
    started = position - torch.tensor(held, device=device)
    length = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths, device=device)
    return Layout(plan, any(held), started, length, *(t.to(device) for t in (due, row, number, last)))


@functools.lru_cache(DENSE_LAYOUTS)
def _dense(device: torch.device, sequences: int, length: int, chunk_size: int) -> Layout:
    """Whole chunks from position 0: the grid is a view of the input. Fit for later calls, with gradients or without."""
    with torch.inference_mode(False):
        return _new_dense(device, sequences, length, chunk_size)


def _new_dense(device: torch.device, sequences: int, length: int, chunk_size: int) -> Layout:
    chunks = length // chunk_size
    order, index = (torch.arange(n, device=device) for n in (sequences, chunks * sequences))
    nothing = order[:0]
    plan = ChunkPlan(
        chunk_size, order, order, [sequences] * chunks, [None] * chunks, nothing, nothing, sequences * length, True
    )
    number = index // sequences
    last = order + (chunks - 1) * sequences
    due, started = number < chunks - 1, torch.zeros_like(order)
    return Layout(plan, False, started, length, due, index % sequences, number, last)


def _unknown(position: Tensor, sequences: int, length: int, chunk_size: int) -> Layout:
    """Sequences whose positions only the device knows: one chunk more than they may need, and no look at them."""
    chunks = (length - 1) // chunk_size + 2
    order = torch.arange(sequences, device=position.device)
    held = num_pending(position, chunk_size)
    index = torch.arange(chunks * sequences, device=position.device)
    row, number = index % sequences, index // sequences
    steps = torch.arange(chunk_size, device=position.device)
    token = number[:, None] * chunk_size + steps - held[row][:, None]
    total = sequences * length
    kept = total + row[:, None] * chunk_size + steps
    source = torch.where(token < length, row[:, None] * length + token, total + sequences * chunk_size)
    source = torch.where((token < 0) & (number == 0)[:, None], kept, source)
    at = held[:, None] + torch.arange(length, device=position.device)
    slot = ((at // chunk_size * sequences + order[:, None]) * chunk_size + at % chunk_size).flatten()
    extent = held + length
    due = extent[row] > (number + 1) * chunk_size
    last = (extent - 1) // chunk_size * sequences + order
    plan = ChunkPlan(
        chunk_size, order, order, [sequences] * chunks, [], source, slot, total + sequences * chunk_size, False
    )
    return Layout(plan, True, position - held, length, due, row, number, last)


def pack(memory: LactMemory, layout: Layout) -> Memory:
    """Flat, one row per sequence in the plan's order."""
    w = memory.weights
    weights = torch.cat([t.flatten(2) for t in (w.w0, w.w2, w.w1)], -1)
    flat = Memory(weights, torch.cat(_flat_order(memory.norms), -1), _flat(memory.momentum), _flat(memory.accumulator))
    return flat if _ordered(layout) else map_tensors(lambda t: t.index_select(0, layout.plan.order), flat)


def unpack(flat: Memory, like: LactMemory, layout: Layout) -> LactMemory:
    """The inverse of `pack`; norms are those of `like`."""
    if not _ordered(layout):
        flat = map_tensors(lambda t: t.index_select(0, layout.plan.rank), flat)
    learned = len(like.norms)
    inner, outer = like.weights.w0.shape[-2:], like.weights.w1.shape[-2:]
    w0, w2, w1 = _split(flat.weights, (inner, inner, outer))
    shapes = (inner, inner, outer) if learned == 3 else (outer,)

    def parts(t: Tensor | None) -> tuple[Tensor, ...] | None:
        return None if t is None else _flat_order(_split(t, shapes))

    weights = LactWeights(w0, w1, w2) if learned == 3 else like.weights._replace(w1=w1)
    return LactMemory(weights, like.norms, parts(flat.momentum), parts(flat.accumulator))


def count(faults: Faults, good: Tensor, layout: Layout, *, fused: bool = False) -> Faults:
    """Add the updates that were due, but are not among those that happened, `good` [R]. fused: by one kernel."""
    if fused:
        from fastweight.ops.lact.fused import count_refused  # needs triton

        with torch.cuda.device_of(good):
            return count_refused(faults, good, layout)
    bad = layout.due > good
    if layout.plan.dense:
        by_chunk = bad.unflatten(0, (-1, len(layout.last)))  # [chunks, sequences]
        # The compiler takes a view of booleans for booleans, of which it can find no largest one.
        flags = by_chunk.to(torch.uint8) if torch.compiler.is_compiling() else by_chunk.view(torch.uint8)
        return faults.add(by_chunk.sum(0), flags.argmax(0) * layout.plan.chunk_size)
    sequence = layout.plan.order[layout.row]
    where = layout.started[sequence] + layout.number * layout.plan.chunk_size
    where = torch.where(bad, where, torch.iinfo(torch.int64).max)
    number = torch.zeros_like(faults.count).index_add(0, sequence, bad.long())
    return faults.add(number, torch.full_like(faults.first, torch.iinfo(torch.int64).max).scatter_reduce(
        0, sequence, where, "amin"
    ))  # fmt: skip


def last_chunks(grid: LactPending, layout: Layout) -> LactPending:
    """The tokens of each sequence's last chunk, in the order of the sequences."""
    if layout.plan.dense:
        return map_tensors(lambda t: t[-len(layout.last) :], grid)
    return map_tensors(lambda t: t.index_select(0, layout.last), grid)


def tokens_on_grid(tokens: LactPending, pending: LactPending, layout: Layout) -> LactPending:
    """New tokens and those that wait, [R, C, …]."""
    return zip_tensors(layout.gather, tokens, pending)


def _ordered(layout: Layout) -> bool:
    """Whether the plan keeps the order of the sequences, as far as the host can tell for nothing."""
    return layout.plan.dense or len(set(layout.plan.active)) == 1


def _flat_order(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(w0, w1, w2) ↔ (w0, w2, w1)."""
    return tuple(parts) if len(parts) == 1 else (parts[0], parts[2], parts[1])


def _flat(parts: tuple[Tensor, ...] | None) -> Tensor | None:
    return None if parts is None else torch.cat([t.flatten(2) for t in _flat_order(parts)], -1)


def _split(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = flat.split([rows * columns for rows, columns in shapes], -1)
    return [part.unflatten(-1, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
