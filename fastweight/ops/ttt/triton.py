"""Kernels as a backend: what they refuse, and the way from the op's arguments to theirs."""

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.ttt import TTTWeights
from fastweight.ops.ttt.layout import MAX_CHUNK, MAX_DIM

WAY_OUT = 'Use backend="chunked"'


def refuses(x: Tensor, *args: Tensor | TTTWeights, **options: object) -> str | None:
    """Why the kernels cannot run on q (and what comes with it), or None if they can."""
    if reason := why_no_kernels(x):
        return reason
    if x.dim() == 4 and x.shape[-1] > MAX_DIM:
        return f"holds heads of up to {MAX_DIM} channels, got {x.shape[-1]}. {WAY_OUT}, or more and smaller heads."
    if not args:
        return None
    q, k, v, rate, tau, ln_weight, ln_bias, weights, pending, position = args
    if tau.shape[0] > MAX_CHUNK:
        return (
            f"takes mini-batches of up to {MAX_CHUNK} tokens, got {tau.shape[0]}. {WAY_OUT}, or a smaller chunk_size."
        )
    if not q.dtype == k.dtype == v.dtype:
        return f"needs q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}. {WAY_OUT}, or convert them."
    state = [t for tree in (weights, pending) for t in tree if t is not None]
    if wide := {str(t.dtype) for t in state} - {"torch.float32"}:
        return f"keeps its state in float32, got {', '.join(sorted(wide))}. {WAY_OUT}, or convert the state."
    tensors = (q, k, v, rate, tau, ln_weight, ln_bias, position, *state)
    if len(devices := {str(t.device) for t in tensors}) > 1:
        return f"needs all tensors on one device, got {', '.join(sorted(devices))}. Move them to the device of q."
    return None


@dispatch.register_backend("ttt_linear", "triton", refuses)
def run_linear(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    weights: TTTWeights, pending: TTTWeights, position: Tensor, *, eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, TTTWeights, TTTWeights, Tensor]:  # fmt: skip
    """As the other backends; fast weights and sums in float32, products in q's dtype."""
    from fastweight.ops.ttt.triton_linear import linear

    tensors = (q, k, v, rate, tau, ln_weight, ln_bias, weights.w1, weights.b1, pending.w1, pending.b1)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device)
    y, w, b, s, sb, flags, *_ = linear(*(t.contiguous() for t in tensors), position, cu_seqlens, eps, keep)
    return y, TTTWeights(w, b), TTTWeights(s, sb), (flags > 0).any(-1)
