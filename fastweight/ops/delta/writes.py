"""Writes that are not finite become no-ops, before any backend sees them.

One key or value that is NaN would spread over its chunk, and through the memory over the rest of its sequence: a
product with zero does not take it away. So such rows are replaced by zeros, in a pass over k and v. What replaces them
is a constant, and with k = v = β = 0 every term of their gradients has a factor zero: gradients need no such pass.
"""

from typing import Any

import torch
from torch import Tensor

from fastweight.ops.launch import block, launch

ROWS = 32  # heads that one program looks at together


def drop_bad_writes(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, wide: torch.dtype, *, kernel: bool
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(k, v, β, log decay) without the writes that are not finite, and marks of those for `account`.

    k, v: [B, T, M, H, ·]. beta: [B, T, M, H]; log_decay: [B, T, H] or None, zeros then; both come back in the dtype
    `wide`. kernel: in one launch; otherwise, or where this cannot be had, by torch.
    """
    tensors = [k, v, beta] + ([] if log_decay is None else [log_decay])
    together = all(t.device == k.device for t in tensors)
    if kernel and together and wide == torch.float32 and not torch.compiler.is_compiling():
        *inputs, marks = _KeepFinite.apply(k, v, beta, log_decay)
        decay = inputs.pop() if log_decay is not None else _no_decay(beta, wide)
        return (*inputs, decay), marks
    decay = _no_decay(beta, wide) if log_decay is None else log_decay.to(wide)
    return _by_torch(k, v, beta.to(wide), decay)


def _no_decay(beta: Tensor, wide: torch.dtype) -> Tensor:
    return beta.new_zeros(beta[:, :, 0].shape, dtype=wide)


def _by_torch(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Marks are [B, T], of tokens."""
    good = k.isfinite().all(-1) & v.isfinite().all(-1) & beta.isfinite() & decay.isfinite().unsqueeze(2)
    k, v = (torch.where(good[..., None], x, torch.zeros_like(x)) for x in (k, v))
    beta = torch.where(good, beta, torch.zeros_like(beta))
    decay = torch.where(good.all(2), decay, torch.zeros_like(decay))
    return (k, v, beta, decay), ~good.flatten(2).all(-1)


class _KeepFinite(torch.autograd.Function):
    """Float32 β and decay (if there is one); marks are int8 [B, T, H], of heads."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> tuple[Tensor, ...]:
        *results, marks = _launch(k, v, beta, decay)
        ctx.mark_non_differentiable(marks)
        ctx.set_materialize_grads(False)
        ctx.dtypes = (beta.dtype, None if decay is None else decay.dtype)
        if decay is not None:
            ctx.save_for_backward(marks)
        return (*results, marks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dk, dv, dbeta, *rest = grads[:-1]
        dbeta = None if dbeta is None else dbeta.to(ctx.dtypes[0])
        if not rest or rest[0] is None:
            return dk, dv, dbeta, None
        (marks,) = ctx.saved_tensors
        # The memory goes on through a dropped decay, so this gradient is not zero by itself.
        return dk, dv, dbeta, torch.where(marks.view(torch.bool), 0.0, rest[0]).to(ctx.dtypes[1])


def _launch(k: Tensor, v: Tensor, beta: Tensor, decay: Tensor | None) -> list[Tensor]:
    from fastweight.ops.delta.kernels_writes import keep_finite_writes

    order, heads = k.shape[2:4]
    rows = [x.flatten(0, 1).flatten(1, 2) for x in (k, v)]  # views of what a projection gives, cut or not
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in rows]
    strengths = [x.contiguous() for x in ((beta,) if decay is None else (beta, decay))]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)]
    out += [torch.empty_like(x, dtype=torch.float32) for x in strengths]
    marks = torch.empty((*k.shape[:2], heads), dtype=torch.int8, device=k.device)
    gated = decay is not None
    # Without a decay its two places are never looked at.
    given = [*rows, *strengths, *out] if gated else [*rows, beta, beta, *out, beta]
    sizes = {"K": k.shape[-1], "V": v.shape[-1]}
    blocks = {f"BLOCK_{name}": block(size) for name, size in sizes.items()}
    with torch.cuda.device_of(k):
        launch(
            keep_finite_writes, (k.shape[0] * k.shape[1],), [*given, marks],
            [*(stride for x in rows for stride in x.stride()[:2]), heads],
            {"ORDER": order, "GATED": gated, **sizes, **blocks, "BLOCK_H": min(ROWS, 1 << (heads - 1).bit_length())},
            {"num_warps": 4},
        )  # fmt: skip
    return [*out, marks]
