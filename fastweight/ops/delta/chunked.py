"""Whole chunks at once: a triangular solve turns the writes of a chunk into one correction of the memory.

With G the running sum of log decays inside a chunk and D the corrections actually written,
(I + L) D = diag(β) V − diag(β e^G) K S with L_ij = β_i e^{G_i − G_j} k_i·k_j for i > j;
O = diag(e^G) Q S + tril(Q Kᵀ e^{G_i − G_j}) D and S' = e^{G_C} S + Kᵀ diag(e^{G_C − G}) D
(Yang et al. 2024, arXiv:2406.06484, eq. 10–11; with decay arXiv:2412.06464, section 3.3). Differences of log decays are
taken before the exponential, so strong decay cannot overflow. All solves are done for all chunks together; only the
memory's own recurrence is a loop.
"""

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.delta.naive import naive
from fastweight.ops.sequences import plan_chunks, sequence_lengths

# Tokens solved together; a tile, not part of the function. On a GPU few long steps beat many short ones: the recurrence
# waits for launches there, not for arithmetic.
BLOCK, CUDA_BLOCK = 64, 256


@dispatch.register_backend("delta_rule", "chunked")
def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor, *,
    cu_seqlens: Tensor | None, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, order = q.shape[0], q.shape[1], k.shape[2]
    lengths = sequence_lengths(batch, length, cu_seqlens)
    if max(lengths) == 1:
        return naive(q, k, v, beta, decay, memory, cu_seqlens=cu_seqlens, gated=gated)
    q, k, v = (x.to(memory.dtype) for x in (q, k, v))
    if order > 1:
        q, decay = last(q, order), first(decay, order)
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    block = min(CUDA_BLOCK if q.is_cuda else BLOCK, 1 << (max(lengths) * order - 1).bit_length())
    plan = plan_chunks([n * order for n in lengths], [0] * len(lengths), block, q.device)
    q = q.unflatten(2, (k.shape[2], -1)).transpose(2, 3)  # [B, T, queries of a memory, H, K]
    queries = plan.gather(q).permute(0, 3, 2, 1, 4)  # [chunks, H, queries of a memory, block, K]
    grids = [plan.gather(x).transpose(1, 2) for x in (k, v, beta, decay)]  # [chunks, H, block, ·]
    chunks = [plan.split(x) for x in _solve(queries, *grids, gated=gated)]
    memory = memory.index_select(0, plan.order)
    outputs, finished = [], []
    for active, (read, mix, key, value, removed, keep) in zip(plan.active, zip(*chunks, strict=True), strict=True):
        if active < memory.shape[0]:
            finished.append(memory[active:])
            memory = memory[:active]
        written = value - removed @ memory
        outputs.append(read @ memory + mix @ written)
        memory = keep * memory + key.transpose(-1, -2) @ written
    memory = torch.cat([memory, *reversed(finished)]).index_select(0, plan.rank)
    y = torch.cat(outputs).unflatten(2, (-1, block)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    y = plan.scatter(y, batch)
    return (y[:, order - 1 :: order] if order > 1 else y), memory


def _solve(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, *, gated: bool) -> tuple[Tensor, ...]:
    """Everything a chunk needs that does not depend on the memory it starts from.

    q: [chunks, H, G, block, K]; what is read with it comes back with G · block rows.
    """
    block = q.shape[3]
    scores = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (-1, block))
    overlap = (beta[..., None] * k) @ k.transpose(-1, -2)
    ones = q.new_ones(1, 1, 1, 1)
    read, key, scaled, keep = q, k, beta[..., None] * k, ones.expand(q.shape[0], q.shape[1], 1, 1)
    if gated:
        total = decay.cumsum(-1)
        # Above the diagonal the difference is positive and could overflow; those entries are masked before exp.
        upper = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
        ratio = (total[..., :, None] - total[..., None, :]).masked_fill(upper, -torch.inf).exp()
        scores, overlap = scores * ratio.unsqueeze(2), overlap * ratio
        read, scaled = q * total.exp()[:, :, None, :, None], scaled * total.exp()[..., None]
        keep = total[..., -1:, None].exp()
        key = k * (total[..., -1:] - total).exp()[..., None]
    # unitriangular: the diagonal is taken as ones, what stands there and above is ignored.
    right = torch.cat([beta[..., None] * v, scaled], -1)
    solved = torch.linalg.solve_triangular(overlap.tril(-1), right, upper=False, unitriangular=True)
    value, removed = solved.split([v.shape[-1], k.shape[-1]], -1)
    return read.flatten(2, 3), scores.tril().flatten(2, 3), key, value, removed, keep


def last(x: Tensor, order: int) -> Tensor:
    """Put x in the last of each token's micro-steps, zeros in the others."""
    padded = torch.cat([x.new_zeros(*x.shape[:2], order - 1, *x.shape[2:]), x.unsqueeze(2)], 2)
    return padded.flatten(1, 2)


def first(x: Tensor, order: int) -> Tensor:
    """Put x in the first of each token's micro-steps, zeros in the others."""
    padded = torch.cat([x.unsqueeze(2), x.new_zeros(*x.shape[:2], order - 1, *x.shape[2:])], 2)
    return padded.flatten(1, 2)
