"""Whole chunks at once, all sequences together: a product to read a chunk, a product to learn it.

The loop runs over chunks only. A chunk that began in an earlier call needs two additions: the convolution of its first
tokens looks back at the tail, and the tail's tokens receive the terms of their values that were still to come.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.in_place import REACH, WIDTH, InPlaceState, InPlaceTail, Rule
from fastweight.ops.sequences import ChunkPlan, advance, plan_chunks, rows_due, sequence_lengths
from fastweight.state import Faults, map_tensors, zip_tensors


class Carried(NamedTuple):
    """What passes from chunk to chunk, one row per running sequence. start: position of the next chunk."""

    memory: Tensor
    faults: Faults
    start: Tensor


class Chunk(NamedTuple):
    """Σ vᵀh of a chunk [rows, D, I], and whether a token of it was not finite [rows]."""

    total: Tensor
    spoiled: Tensor


@dispatch.register_backend("in_place", "chunked")
def chunked(
    hidden: Tensor, target: Tensor, bad: Tensor, taps: Tensor, projection: Tensor | None, weight: Tensor,
    state: InPlaceState, *, rule: Rule, cu_seqlens: Tensor | None,
) -> tuple[Tensor, InPlaceState]:  # fmt: skip
    """bad: [B, T], the tokens that were not finite and are zero now; the rest as in `in_place`."""
    batch, length = hidden.shape[:2]
    lengths = sequence_lengths(batch, length, cu_seqlens)
    sizes = torch.full((batch,), length, device=hidden.device) if cu_seqlens is None else cu_seqlens.diff()
    sizes = sizes.to(hidden.device, torch.int64)
    late = _late(target, taps, state, sizes, rule)
    tail = _last_two(target, hidden, state, sizes, rule)
    if max(lengths) == 1:
        hidden, target, bad = (t.flatten(0, 1) for t in (hidden, target, bad))
        y, after = _step(hidden, target, bad, taps, projection, weight, late, state, rule)
        return y.unflatten(0, (batch, length)), after._replace(tail=tail)
    phases = (state.position % rule.chunk_size).tolist()
    plan = plan_chunks(lengths, phases, rule.chunk_size, hidden.device)
    values = _project(_convolve(_surround(plan, target, state, phases), taps), projection)
    grids = plan.gather(hidden), values, plan.gather(bad[..., None]).flatten(1).any(1)
    pending = torch.baddbmm(state.pending, _project(late, projection).transpose(1, 2), state.tail.hidden)
    outputs, carried, left = _loop(plan, grids, state._replace(pending=pending), weight, rule)
    position = advance(state.position, length, cu_seqlens)
    after = InPlaceState(carried.memory, left.total, tail, left.spoiled, position, carried.faults)
    return plan.scatter(outputs, batch), after


def _loop(
    plan: ChunkPlan, grids: tuple[Tensor, ...], state: InPlaceState, weight: Tensor, rule: Rule
) -> tuple[Tensor, Carried, Chunk]:
    """All chunks in turn: reads of every slot, and per sequence what is carried and what stays pending."""
    limit = _limit(weight, state.memory.dtype, rule)
    start = state.position - state.position % rule.chunk_size
    started = Carried(state.memory, state.faults, start), Chunk(state.pending, state.spoiled)
    carried, before = map_tensors(lambda t: t.index_select(0, plan.order), started)
    outputs, finished = [], []
    for i, (hidden, values, bad) in enumerate(zip(*(plan.split(grid) for grid in grids), strict=True)):
        outputs.append(hidden @ carried.memory.transpose(1, 2))
        chunk = Chunk(values.transpose(1, 2) @ hidden, bad)
        if i == 0:
            chunk = Chunk(chunk.total + before.total, bad | before.spoiled)
        full = plan.complete[i]
        learned = _learn(carried, chunk, limit, rule)
        if full is not None:
            learned = zip_tensors(lambda new, old, full=full: torch.where(_like(full, new), new, old), learned, carried)
        going = plan.active[i + 1] if i + 1 < len(plan.active) else 0
        if going < plan.active[i]:
            ended = torch.ones_like(bad) if full is None else full
            left = map_tensors(lambda t, ended=ended: t.masked_fill(_like(ended, t), 0), chunk)
            finished.append(map_tensors(lambda t, n=going: t[n:], (learned, left)))
        carried = map_tensors(lambda t, n=going: t[:n], learned)
    done = zip_tensors(lambda *t: torch.cat(t).index_select(0, plan.rank), *reversed(finished))
    return torch.cat(outputs), *done


def _step(
    hidden: Tensor, target: Tensor, bad: Tensor, taps: Tensor, projection: Tensor | None, weight: Tensor,
    late: Tensor, state: InPlaceState, rule: Rule,
) -> tuple[Tensor, InPlaceState]:  # fmt: skip
    """One token per sequence, [N, ·]. The rows whose chunk ends must be known on the host: an update under a mask would
    cost every token what it costs one token in chunk_size. That is the only synchronisation."""
    y = torch.einsum("ndi,ni->nd", state.memory, hidden)
    seen = F.pad(torch.cat([state.tail.target, target[:, None]], 1), (0, 0, 0, REACH))
    values = _project(torch.cat([late, _convolve(seen, taps)], 1), projection)
    keys = torch.cat([state.tail.hidden, hidden[:, None]], 1)
    pending = torch.baddbmm(state.pending, values.transpose(1, 2), keys)
    spoiled, position = state.spoiled | bad, state.position + 1
    memory, faults = state.memory, state.faults
    due = rows_due(position % rule.chunk_size == 0)
    if due.numel():
        carried = Carried(memory, faults, position - rule.chunk_size)
        chosen, chunk = map_tensors(lambda t: t.index_select(0, due), (carried, Chunk(pending, spoiled)))
        learned = _learn(chosen, chunk, _limit(weight, memory.dtype, rule), rule)
        memory, faults, _ = zip_tensors(lambda t, new: t.index_copy(0, due, new), carried, learned)
        pending, spoiled = (t.index_fill(0, due, 0) for t in (pending, spoiled))
    return y, InPlaceState(memory, pending, state.tail, spoiled, position, faults)


def _learn(carried: Carried, chunk: Chunk, limit: Tensor | None, rule: Rule) -> Carried:
    """Add inner_lr · total and scale back to `limit`; rows that are spoiled or would not be finite stay as they are."""
    memory, faults, start = carried
    with torch.no_grad():
        moved = torch.add(memory, chunk.total, alpha=rule.inner_lr)
        bad = chunk.spoiled | ~_norm(moved).isfinite()
    # The total is zeroed rather than its sum replaced: in the backward pass zero times infinity would be NaN.
    after = torch.add(memory, chunk.total.masked_fill(_like(bad, memory), 0), alpha=rule.inner_lr)
    if limit is not None:
        norm = _norm(after)
        over = (norm > limit) & ~bad
        # The inner `where` keeps a division by zero out of the backward pass.
        scale = torch.where(over, limit / torch.where(over, norm, torch.ones_like(norm)), torch.ones_like(norm))
        after = after * _like(scale, after)
    return Carried(after, faults.add(bad.long(), start), start + rule.chunk_size)


def _norm(memory: Tensor) -> Tensor:
    return torch.linalg.vector_norm(memory, dim=(1, 2))


def _limit(weight: Tensor, dtype: torch.dtype, rule: Rule) -> Tensor | None:
    """The largest norm of the memory."""
    return None if rule.max_norm is None else rule.max_norm * torch.linalg.vector_norm(weight, dtype=dtype)


def _convolve(seen: Tensor, taps: Tensor) -> Tensor:
    """Depthwise convolution along dimension 1 of [·, T + 4, D] → [·, T, D]."""
    length = seen.shape[1] - 2 * REACH
    y = seen[:, :length] * taps[:, 0]
    for tap in range(1, WIDTH):
        y = torch.addcmul(y, seen[:, tap : tap + length], taps[:, tap])
    return y


def _project(values: Tensor, projection: Tensor | None) -> Tensor:
    return values if projection is None else values @ projection


def _surround(plan: ChunkPlan, target: Tensor, state: InPlaceState, phases: list[int]) -> Tensor:
    """Targets on the grid of chunks with two slots before and after each, [chunks, C + 4, D].

    Those slots and the empty ones are zero, but for the tail, which stands before the first token of its sequence.
    """
    grid = F.pad(plan.gather(target), (0, 0, REACH, REACH))
    if not any(phases):
        return grid
    rows = plan.active[0]
    slot = torch.tensor(phases, device=grid.device)[plan.order, None] + torch.arange(REACH, device=grid.device)
    tail = state.tail.target.index_select(0, plan.order)
    first = grid[:rows].scatter(1, slot[..., None].expand_as(tail), tail)
    return torch.cat([first, grid[rows:]])


def _late(target: Tensor, taps: Tensor, state: InPlaceState, sizes: Tensor, rule: Rule) -> Tensor:
    """What the next two targets of their chunk add to the values of the tail's tokens, not projected: [N, 2, D]."""
    flat, starts = target.flatten(0, 1), sizes.cumsum(0) - sizes
    has_second = (sizes > 1) & ((state.position + 1) % rule.chunk_size != 0)
    first = flat.index_select(0, starts)
    second = flat.index_select(0, torch.where(has_second, starts + 1, starts)) * has_second[:, None]
    return torch.stack([first * taps[:, 4], first * taps[:, 3] + second * taps[:, 4]], 1)


def _last_two(target: Tensor, hidden: Tensor, state: InPlaceState, sizes: Tensor, rule: Rule) -> InPlaceTail:
    """The tail after this call's tokens: zeros where a token belongs to a chunk that has ended."""
    ends, held = sizes.cumsum(0), (state.position + sizes) % rule.chunk_size
    inside = torch.stack([held > 1, held > 0], 1)[..., None]

    def take(tokens: Tensor, tail: Tensor) -> Tensor:
        flat = tokens.flatten(0, 1)
        newest, earlier = flat.index_select(0, ends - 1), flat.index_select(0, (ends - 2).clamp(min=0))
        earlier = torch.where((sizes > 1)[:, None], earlier, tail[:, 1])
        return torch.where(inside, torch.stack([earlier, newest], 1), 0)

    return InPlaceTail(take(target, state.tail.target), take(hidden, state.tail.hidden))


def _like(rows: Tensor, t: Tensor) -> Tensor:
    """[N] shaped to broadcast over t [N, ...]."""
    return rows.view(-1, *[1] * (t.dim() - 1))
