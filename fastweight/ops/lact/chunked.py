"""Whole chunks at once: all sequences and heads of a chunk in batched products; the loop runs over chunks only."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.configs import require
from fastweight.ops import dispatch
from fastweight.ops.elementwise import kernels_run, put_tokens
from fastweight.ops.lact import LactPending, LactState, Rule, is_fresh, positions, unit
from fastweight.ops.lact.layout import Layout, count, last_chunks, lay_out, pack, tokens_on_grid, unpack
from fastweight.ops.lact.update import network
from fastweight.ops.sequences import may_overwrite, recording, sequence_lengths
from fastweight.state import map_tensors, zip_tensors


def traceable(q: Tensor, *args: object, cu_seqlens: Tensor | None = None, **settings: object) -> bool:
    """Whether nothing depends on numbers that only the host may read: whole batches of more than one token."""
    return cu_seqlens is None and q.shape[1] > 1


@dispatch.register_backend("lact", "chunked", traceable=traceable)
def chunked(
    q: Tensor, tokens: LactPending, state: LactState, *, rule: Rule, cu_seqlens: Tensor | None
) -> tuple[Tensor, LactState]:
    """q: [B, T, H, D] (or packed); tokens: what the state's buffers keep of each token, [B, T, ...]."""
    return run(q, tokens, state, rule, cu_seqlens, precise=True, fused=False)


def run(
    q: Tensor,
    tokens: LactPending,
    state: LactState,
    rule: Rule,
    cu_seqlens: Tensor | None,
    *,
    precise: bool,
    fused: bool,
) -> tuple[Tensor, LactState]:
    """precise, fused: see `unit.Settings`. The host looks at the device only for positions that it does not know, and
    only if the work depends on them: packed sequences, and single tokens (once; then it counts along)."""
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    single = max(lengths) == 1
    if recording(q):
        require(single and cu_seqlens is None, "lact: only steps of one token per sequence can be recorded.")
        return _append(q, tokens, state, rule)
    at = positions.known(state.position, look=single or cu_seqlens is not None)
    if single and at is not None:
        y, after = _read_tokens(q, tokens, state, rule, at, packed=cu_seqlens is not None, precise=precise, fused=fused)
    else:
        y, after = _read_chunks(q, tokens, state, rule, lengths, at, precise=precise, fused=fused)
    if at is not None:
        positions.remember(after.position, [p + n for p, n in zip(at, lengths, strict=True)])
    return y, after


def _read_chunks(
    q: Tensor, tokens: LactPending, state: LactState, rule: Rule, lengths: Sequence[int], at: Sequence[int] | None,
    *, precise: bool, fused: bool,
) -> tuple[Tensor, LactState]:  # fmt: skip
    layout = lay_out(state.position, lengths, at, rule.chunk_size, fresh=is_fresh(state))
    grid = tokens_on_grid(tokens, state.pending, layout)
    before = state.pending.k.new_zeros(()).expand_as(state.pending.k) if layout.pending else None
    queries = layout.gather(q, before)
    pending, position = last_chunks(grid, layout), state.position + layout.length
    if not rule.learn:
        dtype = state.memory.weights.w1.dtype if precise else state.pending.k.dtype
        y = layout.plan.scatter(_read_fixed(queries, state, layout, dtype), q.shape[0])
        return y, LactState(state.memory, pending, position, state.faults)
    memory = pack(state.memory, layout)
    leaves = [t for t in (q, *grid, *memory) if t is not None]
    settings = unit.Settings(
        [] if len(set(layout.plan.active)) == 1 else layout.plan.active, rule.muon, rule.muon_dtype, rule.prenorm,
        rule.update, precise, fused, save=torch.is_grad_enabled() and any(t.requires_grad for t in leaves),
    )  # fmt: skip
    y, end, good = unit.run(queries, *grid, layout.due, memory, settings)
    faults = count(state.faults, good, layout, fused=fused and not unit.traced())
    after = LactState(unpack(end, state.memory, layout), pending, position, faults)
    return layout.plan.scatter(y, q.shape[0]), after


def _read_fixed(queries: Tensor, state: LactState, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Chunks of queries [R, C, H, D] read by weights that do not change, rounded where the unit rounds."""
    sequence = layout.plan.order[layout.row]
    w0, w1, w2 = (t.to(dtype).index_select(0, sequence) for t in state.memory.weights)
    both = queries.to(dtype).transpose(1, 2) @ torch.cat([w0, w2], -2).mT
    a, u = both.to(state.memory.weights.w1.dtype).chunk(2, -1)
    return ((F.silu(a) * u).to(dtype) @ w1.mT).transpose(1, 2)


def _read_tokens(
    q: Tensor, tokens: LactPending, state: LactState, rule: Rule, at: Sequence[int], *, packed: bool, precise: bool,
    fused: bool,
) -> tuple[Tensor, LactState]:  # fmt: skip
    """One token per sequence. Only sequences whose chunk is full learn; the others take no part in an update."""
    if packed:
        q, tokens = q.transpose(0, 1), map_tensors(lambda t: t.transpose(0, 1), tokens)
    due = [n for n, p in enumerate(at) if p > 0 and p % rule.chunk_size == 0]
    how = {"precise": precise, "fused": fused}
    if len(due) == len(at):
        y, after = _read_chunks(q, tokens, state, rule, [1] * len(at), at, **how)
    else:
        y, after = _append(q, tokens, state, rule)
        if due:
            rows = torch.tensor(due, device=q.device)
            a, b, c = map_tensors(lambda t: t.index_select(0, rows), (q, tokens, state))
            learned = _read_chunks(a, b, c, rule, [1] * len(due), [at[n] for n in due], **how)
            y, after = zip_tensors(lambda t, new: t.index_copy(0, rows, new.to(t.dtype)), (y, after), learned)
    return y.transpose(0, 1) if packed else y, after


def _append(q: Tensor, tokens: LactPending, state: LactState, rule: Rule) -> tuple[Tensor, LactState]:
    """Tokens [N, 1, H, …] that fill no chunk: the weights stay as they are."""
    y = network(state.memory.weights, q.to(state.memory.weights.w1.dtype).transpose(1, 2)).transpose(1, 2)
    pending, position = _put(state.pending, tokens, state.position), state.position + 1
    return y, LactState(state.memory, pending, position, state.faults)


def _put(pending: LactPending, tokens: LactPending, position: Tensor) -> LactPending:
    """Tokens [N, 1, ...] in their slots of the buffers [N, chunk size, ...]."""
    buffers, given = ([t for t in some if t is not None] for some in (pending, tokens))
    if may_overwrite() and all(t.is_contiguous() for t in buffers) and kernels_run(*buffers, *given):
        put_tokens(buffers, given, position)
        return pending
    slot = position % pending.k.shape[1]

    def put(buffer: Tensor, token: Tensor) -> Tensor:
        return buffer.scatter(1, slot.view(-1, *[1] * (token.dim() - 1)).expand_as(token), token)

    return zip_tensors(put, pending, tokens)
