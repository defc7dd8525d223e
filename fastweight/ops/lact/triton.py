"""The GPU's path: bfloat16 products, the element-wise work and Newton–Schulz in fused kernels."""

from typing import Any

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.lact import LactPending, LactState, Rule
from fastweight.ops.lact.chunked import run, traceable

LARGEST = 4096  # of D and F: rows of a matrix are held in registers


def refuses(q: Tensor, *args: Any, **settings: Any) -> str | None:
    """Why these inputs cannot run here, or None. Where there is no call yet, q decides: [..., D]."""
    reason = why_no_kernels(q)
    if reason or not args:
        return reason or _too_large(q.shape[-1])
    _, tokens, state = args[:3]
    given = (*tokens, *state.memory.weights, state.position, *state.faults)
    if others := [t.device for t in given if t is not None and t.device != q.device]:
        found = ", ".join(sorted({str(device) for device in (q.device, *others)}))  # kernels get bare addresses
        return f"needs all tensors on one device, got {found}. Move them to the device of q."
    for what, t in (
        ("tokens kept in", tokens.k),
        ("rates in", tokens.lr),
        ("fast weights in", state.memory.weights.w1),
    ):
        if t.dtype == torch.float64:
            return f'takes {what} float32 or narrower, got {t.dtype}. Use backend="chunked".'
    return _too_large(max(state.memory.weights.w1.shape[-2:]))


def _too_large(dim: int) -> str | None:
    if dim > LARGEST:
        return f'takes head and inner dims up to {LARGEST}, got {dim}. Use more heads, or backend="chunked".'
    return None


@dispatch.register_backend("lact", "triton", refuses, traceable=traceable)
def triton(
    q: Tensor, tokens: LactPending, state: LactState, *, rule: Rule, cu_seqlens: Tensor | None
) -> tuple[Tensor, LactState]:
    """The inputs of `chunked`. Products take k and v in the dtype of the state's buffers, and weights rounded to it."""
    return run(q, tokens, state, rule, cu_seqlens, precise=False, fused=True)
