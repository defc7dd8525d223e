"""Whole chunks at once: all sequences and heads of a chunk in batched products; the loop runs over chunks only."""

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.lact import LactMemory, LactPending, LactState, Rule, num_pending
from fastweight.ops.lact.update import learn, network
from fastweight.ops.sequences import ChunkPlan, advance, plan_chunks, sequence_lengths
from fastweight.state import Faults, map_tensors, zip_tensors


@dispatch.register_backend("lact", "chunked")
def chunked(
    q: Tensor, tokens: LactPending, state: LactState, *, rule: Rule, cu_seqlens: Tensor | None
) -> tuple[Tensor, LactState]:
    """q: [B, T, H, D] (or packed); tokens: what the state's buffers keep of each token, [B, T, ...]."""
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    if max(lengths) == 1:
        return _step(q, tokens, state, rule, packed=cu_seqlens is not None)
    plan, held, grid = lay_out(tokens, state, lengths, rule.chunk_size)
    blank = torch.zeros_like(state.pending.k) if any(held) else None
    queries = plan.split(heads_first(plan.gather(q, blank), state))
    chunks = split_chunks(plan, grid)
    started = state.position - torch.tensor(held, device=q.device)
    carried = map_tensors(lambda t: t.index_select(0, plan.order), (state.memory, state.faults, started))
    outputs, finished = [], []
    for i, query in enumerate(queries):
        outputs.append(network(carried[0].weights, query))
        # A chunk is learned when another token follows: by the sequences that have a next chunk.
        going = plan.active[i + 1] if i + 1 < len(plan.active) else 0
        if going < plan.active[i]:
            finished.append(map_tensors(lambda t, n=going: t[n:], carried))
            carried = map_tensors(lambda t, n=going: t[:n], carried)
        if going:
            carried = _learn(carried, map_tensors(lambda t, n=going: t[:n], chunks[i]), rule)
    joined = zip_tensors(lambda *t: torch.cat(t).index_select(0, plan.rank), *reversed(finished))
    y = plan.scatter(torch.cat(outputs).transpose(1, 2), q.shape[0])
    pending = map_tensors(lambda t: t.index_select(0, _last_chunks(plan)), grid)
    return y, LactState(joined[0], pending, advance(state.position, q.shape[1], cu_seqlens), joined[1])


def lay_out(
    tokens: LactPending, state: LactState, lengths: list[int], chunk_size: int
) -> tuple[ChunkPlan, list[int], LactPending]:
    """The plan, the number of pending tokens of each sequence, and pending and new tokens on the grid of chunks."""
    held = num_pending(state.position, chunk_size).tolist()
    plan = plan_chunks(lengths, held, chunk_size, tokens.k.device, with_pending=any(held))
    if not any(held):
        return plan, held, map_tensors(plan.gather, tokens)
    return plan, held, zip_tensors(plan.gather, tokens, state.pending)


def split_chunks(plan: ChunkPlan, grid: LactPending) -> list[LactPending]:
    """The tokens of each chunk number, [active, C, ...]."""
    parts = [[None] * len(plan.active) if t is None else plan.split(t) for t in grid]
    return [LactPending(*part) for part in zip(*parts, strict=True)]


def heads_first(grid: Tensor, state: LactState) -> Tensor:
    """[chunks, C, H, ...] → [chunks, H, C, ...] in the dtype of the weights."""
    return grid.to(state.memory.weights.w1.dtype).transpose(1, 2).contiguous()


def _learn(carried: tuple, chunk: LactPending, rule: Rule) -> tuple[LactMemory, Faults, Tensor]:
    """The carried rows after `chunk`: memory, faults, and the position at which the next chunk starts."""
    memory, faults, start = carried
    if rule.learn:
        memory, bad = learn(memory, chunk, rule)
        faults = faults.add(bad.long(), start)
    return memory, faults, start + rule.chunk_size


def _last_chunks(plan: ChunkPlan) -> Tensor:
    """Row of the grid that holds each sequence's last chunk."""
    active = torch.tensor(plan.active)
    rank = plan.rank.cpu()
    number = (active[None] > rank[:, None]).sum(1) - 1  # of the last chunk that the sequence has
    return (active.cumsum(0) - active)[number].to(plan.rank.device) + plan.rank


def _step(q: Tensor, tokens: LactPending, state: LactState, rule: Rule, *, packed: bool) -> tuple[Tensor, LactState]:
    """One token per sequence. The rows whose chunk is full must be known on the host: an update under a mask would
    cost every token what it costs one token in chunk_size. That is the only synchronisation."""
    if packed:
        q, tokens = q.transpose(0, 1), map_tensors(lambda t: t.transpose(0, 1), tokens)
    held = num_pending(state.position, rule.chunk_size)
    due = (held == rule.chunk_size).nonzero().flatten()
    memory, pending, faults = state.memory, state.pending, state.faults
    if due.numel():
        carried = (memory, faults, state.position - held)
        chosen, chunk = map_tensors(lambda t: t.index_select(0, due), (carried, pending))
        learned = _learn(chosen, chunk, rule)
        memory, faults, _ = zip_tensors(lambda t, new: t.index_copy(0, due, new), carried, learned)
        pending = map_tensors(lambda t: t.index_fill(0, due, 0), pending)
    y = network(memory.weights, heads_first(q, state)).transpose(1, 2)
    slot = held % rule.chunk_size

    def put(buffer: Tensor, token: Tensor) -> Tensor:
        return buffer.scatter(1, slot.view(-1, *[1] * (token.dim() - 1)).expand_as(token), token)

    pending = zip_tensors(put, pending, tokens)
    return y.transpose(0, 1) if packed else y, LactState(memory, pending, state.position + 1, faults)
