"""A mini-batch at once (the dual form), all heads and all running sequences together.

With G the gradients of a mini-batch's keys under its starting weights, token i reads
f_i(q_i) = q_i W − τ_i Σ_{j ≤ i} rate_j (q_i·k_j + 1) G_j + b (Sun et al. 2024, arXiv:2407.04620, appendix A; the +1 is
the bias). Keys and queries carry a constant channel 1 and b is the last row of W: bias and weight are one matrix.
Scores are computed for all mini-batches before the loop, the read's layer norm after it. Gradients that a mini-batch
collected before this call enter as one more term of its first chunk; a mini-batch that stays unfinished has update
weights of zero and leaves its sum behind. Everything is differentiable, the inner gradient's own derivative included.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops import dispatch
from fastweight.ops.sequences import ChunkPlan, plan_chunks, sequence_lengths
from fastweight.ops.ttt import TTTWeights
from fastweight.ops.ttt.naive import unrolled
from fastweight.ops.ttt.widened import widened

Fast = tuple[Tensor, ...]  # W1 over b1, and for the MLP W2, b2; rows and heads are one dimension
Write = tuple[Tensor, Tensor]  # x and G; the gradient of token j is x_jᵀ G_j


class Chunk(NamedTuple):
    """What a chunk needs that does not depend on the fast weights; first dimension: rows and heads.

    key, query: [·, K, D + 1], with a channel of ones. shift: (bias − target) · weight of the inner layer norm.
    rate: [·, K, 1]. flush: τ_last · rate, 0 where the mini-batch stays unfinished. update: (flush · key)ᵀ.
    eta: lower triangle of τ_i rate_j. mix: eta · query keyᵀ.
    """

    key: Tensor
    query: Tensor
    shift: Tensor
    rate: Tensor
    flush: Tensor
    update: Tensor
    eta: Tensor
    mix: Tensor


class Before(NamedTuple):
    """A started mini-batch: its sums so far, τ [K, 1], and τ_last where it ends in this chunk, else 0, [·, 1, 1]."""

    pending: Fast
    tau: Tensor
    flush: Tensor


class Rule(NamedTuple):
    """The inner layer norm: weight² [·, 1, D], one for each row and head, and eps; guard: look for faults."""

    scale: Tensor
    eps: float
    guard: bool


@dispatch.register_backend("ttt_mlp", "chunked")
@dispatch.register_backend("ttt_linear", "chunked")
@widened
def chunked(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    weights: TTTWeights, pending: TTTWeights, position: Tensor, *, eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, TTTWeights, TTTWeights, Tensor | None]:  # fmt: skip
    norm, tokens = (ln_weight, ln_bias, eps), (q, k, v, rate)
    lengths = sequence_lengths(q.shape[0], q.shape[1], cu_seqlens)
    if max(lengths) == 1:
        return unrolled(*tokens, tau, *norm[:2], weights, pending, position, eps=eps, cu_seqlens=cu_seqlens)
    phases = (position % tau.numel()).tolist()
    plan = plan_chunks(lengths, phases, tau.numel(), q.device)
    heads = q.shape[2]
    chunks = _prepare(plan, *tokens, tau, ln_weight, ln_bias)
    fast, sums = (_flatten(tree, plan.order) for tree in (weights, pending))
    before = Before(sums, tau[:, None], _ends(plan, 1, heads, tau)) if any(phases) else None
    rows = plan.active[0]
    scale = ln_weight.square()[None].expand(rows, -1, -1).reshape(rows * heads, 1, -1)
    z, fast, sums, skipped = _loop(plan, chunks, fast, before, Rule(scale, eps, False), heads)
    # A gradient that is not finite always shows in what it was added to. Only then is the loop repeated with checks.
    if not all(bool(t.isfinite().all()) for t in (*fast, *sums)):
        start = _flatten(weights, plan.order)
        z, fast, sums, skipped = _loop(plan, chunks, start, before, Rule(scale, eps, True), heads)
    z = plan.scatter(z.unflatten(0, (-1, heads)).transpose(1, 2), q.shape[0])
    y = q + torch.addcmul(ln_bias, F.layer_norm(z, z.shape[-1:], eps=eps), ln_weight)
    bad = None if skipped is None else plan.scatter(skipped.unflatten(0, (-1, heads)).any(1), q.shape[0])
    return y, _unflatten(fast, plan.rank, heads), _unflatten(sums, plan.rank, heads), bad


def _prepare(
    plan: ChunkPlan, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor
) -> list[Chunk]:
    """Everything that does not depend on the fast weights, for all chunks together."""
    heads = q.shape[2]
    shift = (ln_bias - (v - k)) * ln_weight
    query, key, shift, rate = (plan.gather(x).transpose(1, 2).flatten(0, 1) for x in (q, k, shift, rate[..., None]))
    key, query = F.pad(key, (0, 1), value=1.0), F.pad(query, (0, 1), value=1.0)
    flush = _ends(plan, len(plan.active), heads, tau) * rate
    eta = (tau[:, None] * rate.transpose(1, 2)).tril()
    grids = (key, query, shift, rate, flush, (flush * key).transpose(1, 2), eta, eta * (query @ key.transpose(1, 2)))
    sizes = [rows * heads for rows in plan.active]
    return [Chunk(*parts) for parts in zip(*(grid.split(sizes) for grid in grids), strict=True)]


def _ends(plan: ChunkPlan, count: int, heads: int, tau: Tensor) -> Tensor:
    """τ_last for the rows that fill their chunk, 0 for the others, over the first `count` chunks: [·, 1, 1]."""
    cells = list(zip(plan.active[:count], plan.complete[:count], strict=True))
    if all(full is None for _, full in cells):
        return tau[-1].expand(sum(rows for rows, _ in cells) * heads, 1, 1)
    masks = [tau.new_ones(rows) if full is None else full.to(tau.dtype) for rows, full in cells]
    return (tau[-1] * torch.cat(masks)).repeat_interleave(heads)[:, None, None]


def _loop(
    plan: ChunkPlan, chunks: list[Chunk], fast: Fast, before: Before | None, rule: Rule, heads: int
) -> tuple[Tensor, Fast, Fast, Tensor | None]:
    """All chunks in turn: pre-norm reads of every slot, final weights and sums of every row, skipped slots."""
    outputs, skipped, finished, left = [], [], [], []
    for i, chunk in enumerate(chunks):
        rule = rule._replace(scale=rule.scale[: fast[0].shape[0]])
        layer = _linear_chunk if len(fast) == 1 else _mlp_chunk
        read, after, writes, bad = layer(chunk, fast, before if i == 0 else None, rule)
        if rule.guard:
            after, bad = _refuse_bad_updates(fast, after, bad)
            skipped.append(bad)
        outputs.append(read)
        staying = heads * (plan.active[i + 1] if i + 1 < len(chunks) else 0)
        if staying < fast[0].shape[0]:
            finished.append([w[staying:] for w in after])
            left.append(_pending(chunk, writes, before if i == 0 else None, plan.complete[i], staying, heads))
        fast = tuple(w[:staying] for w in after)
    final, sums = (tuple(torch.cat(group[::-1]) for group in zip(*parts, strict=True)) for parts in (finished, left))
    return torch.cat(outputs), final, sums, torch.cat(skipped) if skipped else None


def _linear_chunk(
    chunk: Chunk, fast: Fast, before: Before | None, rule: Rule
) -> tuple[Tensor, Fast, list[Write], Tensor | None]:
    (w,) = fast
    grad = _inner_gradient(torch.bmm(chunk.key, w), chunk.shift, rule)
    (grad,), bad = _drop_bad_tokens([chunk.key], [grad], chunk.rate, rule.guard)
    read = torch.baddbmm(torch.bmm(chunk.query, w), chunk.mix, grad, alpha=-1)
    after = torch.baddbmm(w, chunk.update, grad, alpha=-1)
    if before is not None:
        (earlier,) = before.pending
        read = read - before.tau * (chunk.query @ earlier)
        after = after - before.flush * earlier
    return read, (after,), [(chunk.key, grad)], bad


def _mlp_chunk(
    chunk: Chunk, fast: Fast, before: Before | None, rule: Rule
) -> tuple[Tensor, Fast, list[Write], Tensor | None]:
    w1, w2, b2 = fast
    inner = torch.bmm(chunk.key, w1)
    hidden = F.gelu(inner, approximate="tanh")
    grad2 = _inner_gradient(torch.baddbmm(b2, hidden, w2), chunk.shift, rule)
    grad1 = torch.ops.aten.gelu_backward(torch.bmm(grad2, w2.transpose(1, 2)), inner, approximate="tanh")
    (grad1, grad2), bad = _drop_bad_tokens([chunk.key, hidden], [grad1, grad2], chunk.rate, rule.guard)
    read = torch.baddbmm(torch.bmm(chunk.query, w1), chunk.mix, grad1, alpha=-1)
    if before is not None:
        read = read - before.tau * (chunk.query @ before.pending[0])
    read = F.gelu(read, approximate="tanh")
    mix = torch.addcmul(chunk.eta, chunk.eta, torch.bmm(read, hidden.transpose(1, 2)))
    out = torch.baddbmm(torch.baddbmm(b2, read, w2), mix, grad2, alpha=-1)
    step = chunk.flush * grad2
    after = (
        torch.baddbmm(w1, chunk.update, grad1, alpha=-1),
        torch.baddbmm(w2, hidden.transpose(1, 2), step, alpha=-1),
        b2 - step.sum(1, keepdim=True),
    )
    if before is not None:
        out = out - before.tau * torch.baddbmm(before.pending[2], read, before.pending[1])
        after = tuple(w - before.flush * earlier for w, earlier in zip(after, before.pending, strict=True))
    return out, after, [(chunk.key, grad1), (hidden, grad2), (torch.ones_like(chunk.rate), grad2)], bad


def _inner_gradient(z: Tensor, shift: Tensor, rule: Rule) -> Tensor:
    """∂/∂z of ½‖LN(z) − target‖², through the framework's fused layer norm and its (differentiable) backward."""
    unit, mean, inverse = torch.ops.aten.native_layer_norm(z, z.shape[-1:], None, None, rule.eps)
    u = torch.addcmul(shift, unit, rule.scale)
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(u, z, z.shape[-1:], mean, inverse, None, None, mask)[0]


def _pending(
    chunk: Chunk, writes: list[Write], before: Before | None, full: Tensor | None, start: int, heads: int
) -> Fast:
    """Gradient sums that rows from `start` on leave behind: zero where the mini-batch is finished."""
    if full is None:
        return tuple(x.new_zeros(x.shape[0] - start, x.shape[2], grad.shape[2]) for x, grad in writes)
    sums, done = [], full.repeat_interleave(heads)[start:, None, None]
    for n, (x, grad) in enumerate(writes):
        total = x[start:].transpose(1, 2) @ (chunk.rate[start:] * grad[start:])
        total = total if before is None else total + before.pending[n][start:]
        sums.append(torch.where(done, torch.zeros_like(total), total))
    return tuple(sums)


def _drop_bad_tokens(
    xs: list[Tensor], grads: list[Tensor], rate: Tensor, guard: bool
) -> tuple[list[Tensor], Tensor | None]:
    """If guarded: zero the gradients of tokens that would write something not finite; say which, [·, K]."""
    if not guard:
        return grads, None
    good = rate.new_ones(rate.shape, dtype=torch.bool)
    for x, grad in zip(xs, grads, strict=True):
        # The largest entry of the outer product; the bias is written with x = 1.
        reach = x.abs().amax(-1, keepdim=True).clamp(min=1) * (rate * grad).abs().amax(-1, keepdim=True)
        good = good & reach.isfinite()
    return [torch.where(good, grad, torch.zeros_like(grad)) for grad in grads], ~good.squeeze(-1)


def _refuse_bad_updates(fast: Fast, after: Fast, bad: Tensor | None) -> tuple[Fast, Tensor]:
    """Keep the old weights of heads whose update is not finite, and mark the mini-batch's last token."""
    assert bad is not None
    sound = torch.stack([w.isfinite().flatten(1).all(1) for w in after]).all(0)
    kept = tuple(torch.where(sound[:, None, None], new, old) for new, old in zip(after, fast, strict=True))
    return kept, torch.cat([bad[:, :-1], bad[:, -1:] | ~sound[:, None]], 1)


def _flatten(tree: TTTWeights, order: Tensor) -> Fast:
    """Rows in the plan's order, heads folded in, the first layer's bias below its weight."""
    w1, b1, *rest = (t.index_select(0, order).flatten(0, 1) for t in tree if t is not None)
    return (torch.cat([w1, b1], 1), *rest)


def _unflatten(fast: Fast, rank: Tensor, heads: int) -> TTTWeights:
    first, *rest = (t.unflatten(0, (-1, heads)).index_select(0, rank) for t in fast)
    return TTTWeights(first[:, :, :-1], first[:, :, -1:], *rest)
