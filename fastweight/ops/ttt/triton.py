"""Kernels as a backend: what they refuse, and the way from the op's arguments to theirs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.ttt import TTTWeights
from fastweight.ops.ttt.layout import MAX_CHUNK, MAX_DIM, shared_bytes, shared_memory

EVERYWHERE = 99 << 10  # bytes of shared memory that a block may have on every GPU that runs kernels
WAY_OUT = 'Use backend="chunked"'


def refuses(x: Tensor, *args: Any, **options: Any) -> str | None:
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
    needed = shared_bytes(q.shape[-1], tau.shape[0], q.dtype)
    if needed > EVERYWHERE and needed > (there := shared_memory(q.device)):
        sizes = f"mini-batches of {tau.shape[0]} tokens with {q.shape[-1]} channels in {q.dtype}"
        return f"needs {needed >> 10} KiB of shared memory for {sizes}, there are {there >> 10}. {WAY_OUT}."
    if not q.dtype == k.dtype == v.dtype:
        return f"needs q, k and v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}. {WAY_OUT}, or convert them."
    state = [t for tree in (weights, pending) for t in tree if t is not None]
    if wide := [t.dtype for t in state if t.dtype != torch.float32]:
        return f"keeps its state in float32, got {_listed(wide)}. {WAY_OUT}, or convert the state."
    tensors, device = (k, v, rate, tau, ln_weight, ln_bias, position, *state), q.device
    if others := [t.device for t in tensors if t.device != device]:
        return f"needs all tensors on one device, got {_listed([device, *others])}. Move them to the device of q."
    return None


def _listed(values: Sequence[object]) -> str:
    return ", ".join(sorted({str(value) for value in values}))


@dispatch.register_backend("ttt_mlp", "triton", refuses, traceable=lambda *args, **options: True)
@dispatch.register_backend("ttt_linear", "triton", refuses, traceable=lambda *args, **options: True)
def run(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    weights: TTTWeights, pending: TTTWeights, position: Tensor, *, eps: float, cu_seqlens: Tensor | None,
) -> tuple[Tensor, TTTWeights, TTTWeights, Tensor]:  # fmt: skip
    """As the other backends, but faults are marked for each head, integers [B, T, H].

    Memory and sums are float32, products in q's dtype (of a single token in float32).
    """
    from fastweight.ops.ttt.triton_linear import differentiable_linear
    from fastweight.ops.ttt.triton_mlp import differentiable_mlp
    from fastweight.ops.ttt.triton_step import step

    state = [t for tree in (weights, pending) for t in tree if t is not None]
    tensors = [t.contiguous() for t in (q, k, v, rate, tau, ln_weight, ln_bias, *state)]
    parts = len(state) // 2
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if q.shape[1] == 1 and cu_seqlens is None and not keep:
        results = step(*tensors[:7], tensors[7 : 7 + parts], tensors[7 + parts :], position, eps)
    else:
        ends = None if cu_seqlens is None else cu_seqlens.to(q.device)
        results = (differentiable_linear if parts == 2 else differentiable_mlp)(
            *tensors, position.contiguous(), ends, eps, keep
        )
    y, *state, flags = results[: 2 + 2 * parts]
    return y, TTTWeights(*state[:parts]), TTTWeights(*state[parts:]), flags
