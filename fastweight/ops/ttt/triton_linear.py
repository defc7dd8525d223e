"""TTT-Linear's kernels as one differentiable unit, which `torch.compile` does not look into."""

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, parts


@torch.library.custom_op("fastweight::ttt_linear", mutates_args=())
def linear(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w: Tensor, b: Tensor, s: Tensor, sb: Tensor, position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, new W, b, new sums, flags [tokens, H], and, if `keep`, states for the backward pass. All contiguous."""
    from fastweight.ops.ttt.kernels_linear import linear_forward

    results = _results(q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb, position, cu_seqlens, eps, keep)
    layout = Layout.of(q, tau, cu_seqlens)
    y, w_out, b_out, s_out, sb_out, flags, *kept = results
    suspects = torch.empty(layout.sequences, layout.heads, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        for guard in (False, True):
            layout.launch(
                linear_forward, (layout.sequences * layout.heads,), q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb,
                position, position if cu_seqlens is None else cu_seqlens, y, w_out, b_out, s_out, sb_out, flags,
                suspects, *kept, layout.length, eps, layout.heads, keep=int(keep), GUARD=guard, **layout.constants(),
            )  # fmt: skip
    return results


@linear.register_fake
def _results(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w: Tensor, b: Tensor, s: Tensor, sb: Tensor, position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    layout = Layout.of(q, tau, cu_seqlens)
    slots = layout.slots if keep else 0
    flags = torch.zeros(q.shape[:3], dtype=torch.int8, device=q.device)
    kept = [w.new_empty(slots, *w.shape[1:]), b.new_empty(slots, *b.shape[1:])]
    kept.append(w.new_empty(*w.shape[:2], layout.chunk if keep else 0, layout.dim))
    return [torch.empty_like(q), *(torch.empty_like(x) for x in (w, b, s, sb)), flags, *kept]


@torch.library.custom_op("fastweight::ttt_linear_backward", mutates_args=())
def linear_gradients(
    dy: Tensor, dw: Tensor, db: Tensor, ds: Tensor, dsb: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor,
    tau: Tensor, ln_weight: Tensor, ln_bias: Tensor, s: Tensor, sb: Tensor, position: Tensor,
    cu_seqlens: Tensor | None, flags: Tensor, kept_w: Tensor, kept_b: Tensor, kept_before: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, rate, tau, ln_weight, ln_bias, W, b and the sums, from those of the results."""
    from fastweight.ops.ttt.kernels_linear import linear_backward, linear_opening, linear_replay

    layout, ends = Layout.of(q, tau, cu_seqlens), position if cu_seqlens is None else cu_seqlens
    constants, tokens = layout.constants(), (k, v, rate, tau, ln_weight, ln_bias)
    n, h, d = layout.sequences, layout.heads, layout.dim
    dq, dk, dv, drate = (torch.empty_like(x) for x in (q, k, v, rate))
    dtau, dgamma, dbeta = (dw.new_zeros(n, h, size) for size in (layout.chunk, d, d))
    dw, db, ds0, dsb0 = dw.clone(), db.clone(), torch.empty_like(s), torch.empty_like(sb)
    d_before = torch.empty_like(kept_before)
    with torch.cuda.device_of(q):
        for part in parts(layout, position, cu_seqlens, d * (d * q.element_size() + 4)):
            places = part.owner.shape[0] * layout.every
            all_w, all_b = q.new_empty(places, h, d, d), dw.new_empty(places, h, d)
            layout.launch(
                linear_replay, (part.owner.shape[0], h), *tokens, s, sb, position, ends, flags, kept_w, kept_b,
                part.owner, part.base, all_w, all_b, layout.length, n, part.first, eps, h, **constants,
            )  # fmt: skip
            layout.launch(
                linear_backward, (n * h,), dy, q, *tokens, position, ends, flags, all_w, all_b, part.base, kept_before,
                ds, dsb, dq, dk, dv, drate, dtau, dgamma, dbeta, dw, db, ds0, dsb0, d_before, layout.length,
                part.first, part.stop, eps, h, **constants,
            )  # fmt: skip
        del constants["EVERY"]
        layout.launch(
            linear_opening, (n * h,), q, tau, s, sb, position, ends, flags, d_before, dq, dtau, ds0, dsb0,
            layout.length, h, **constants,
        )  # fmt: skip
    sums = (dtau.sum((0, 1)), dgamma.sum(0), dbeta.sum(0))
    shared = [total.to(x.dtype) for total, x in zip(sums, (tau, ln_weight, ln_bias), strict=True)]
    return [dq, dk, dv, drate, *shared, dw, db, ds0, dsb0]


@linear_gradients.register_fake
def _(dy, dw, db, ds, dsb, q, k, v, rate, tau, ln_weight, ln_bias, *rest):
    like = (q, k, v, rate, tau, ln_weight, ln_bias, dw, db, ds, dsb)
    return [torch.empty_like(x) for x in like]


def _remember(ctx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb, position, cu_seqlens = tensors
    kept = output[5:]
    ctx.save_for_backward(
        q, k, v, rate, tau, ln_weight, ln_bias, s, sb, position, cu_seqlens, *kept
    )  # fmt: skip
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, gradients: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors
    q, s, sb = saved[0], saved[7], saved[8]
    given = [
        torch.zeros_like(x) if g is None else g.contiguous()
        for g, x in zip(gradients[:5], (q, s, sb, s, sb), strict=True)
    ]
    found = linear_gradients(*given, *saved, ctx.eps)
    return (*found, None, None, None, None)


linear.register_autograd(_backward, setup_context=_remember)
