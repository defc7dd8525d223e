"""TTT-Linear's kernels as one differentiable unit, which `torch.compile` does not look into."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, Part, parts
from fastweight.ops.ttt.unit import Run, differentiable

Tensors = tuple[Tensor, ...]


def _run(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w: Tensor, b: Tensor, s: Tensor, sb: Tensor, position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, new W, b, new sums, flags [tokens, H], and, if `keep`, states for the backward pass. All contiguous."""
    from fastweight.ops.ttt.kernels_linear import linear_forward

    results = _results(q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb, position, cu_seqlens, eps, keep)
    layout = Layout.of(q, tau, cu_seqlens)
    with torch.cuda.device_of(q):
        layout.launch(
            linear_forward, (layout.sequences * layout.heads,), q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb,
            position, position if cu_seqlens is None else cu_seqlens, *results, layout.length, eps, layout.heads,
            keep=int(keep), **layout.constants(),
        )  # fmt: skip
    return results


def _results(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w: Tensor, b: Tensor, s: Tensor, sb: Tensor, position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    layout = Layout.of(q, tau, cu_seqlens)
    slots = layout.slots if keep else 0
    flags = torch.empty(q.shape[:3], dtype=torch.int8, device=q.device)
    kept = [w.new_empty(slots, *w.shape[1:]), b.new_empty(slots, *b.shape[1:])]
    return [torch.empty_like(q), *(torch.empty_like(x) for x in (w, b, s, sb)), flags, *kept]


linear = torch.library.custom_op("fastweight::ttt_linear", _run, mutates_args=())
linear.register_fake(_results)


def _gradients(
    dy: Tensor, memory: list[Tensor], sums: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rate: Tensor,
    tau: Tensor, ln_weight: Tensor, ln_bias: Tensor, s: Tensor, sb: Tensor, position: Tensor,
    cu_seqlens: Tensor | None, flags: Tensor, kept_w: Tensor, kept_b: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, rate, tau, ln_weight, ln_bias, W, b and the sums. memory, sums: those of the results, each
    a pair, or empty for zeros."""
    layout, d = Layout.of(q, tau, cu_seqlens), q.shape[-1]
    tokens = (q, k, v, rate, tau, ln_weight, ln_bias, s, sb, position, position if cu_seqlens is None else cu_seqlens)
    into = _Gradients(*(torch.empty_like(x) for x in (q, k, v, rate, s, sb, s, sb)))
    shared = None
    with torch.cuda.device_of(q):
        for part in parts(layout, position, cu_seqlens, _bytes_of_one(layout, q)):
            found = _one_part(layout, part, dy, tokens, flags, (kept_w, kept_b), memory, sums, eps, into).sum(0)
            shared, memory = found if shared is None else shared + found, [into.w, into.b]
    assert shared is not None
    sizes = shared[:, : layout.chunk].sum(0), shared[:, layout.chunk : -d], shared[:, -d:]
    totals = [total.to(x.dtype).contiguous() for total, x in zip(sizes, (tau, ln_weight, ln_bias), strict=True)]
    return [*into[:4], *totals, *into[4:]]


class _Gradients(NamedTuple):
    """Where the parts of a backward pass leave their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    w: Tensor
    b: Tensor
    s: Tensor
    sb: Tensor


def _bytes_of_one(layout: Layout, q: Tensor) -> int:
    """What one mini-batch of one head takes between the kernels of a part."""
    memory = layout.dim * (layout.dim * q.element_size() + 4)
    return memory + layout.chunk * (layout.dim * (4 + q.element_size()) + 6 * 4) + 8 * layout.dim


def _one_part(
    layout: Layout, part: Part, dy: Tensor, tokens: Tensors, flags: Tensor, kept: Tensors, memory: list[Tensor],
    sums: list[Tensor], eps: float, into: _Gradients,
) -> Tensor:  # fmt: skip
    """Replay the part's mini-batches, then their reads side by side, then the rest one after the other.

    Back come the gradients of tau, ln_weight and ln_bias as rows of [·, H, chunk + 2 D] that are to be summed.
    """
    from fastweight.ops.ttt.kernels_linear import linear_replay
    from fastweight.ops.ttt.kernels_linear_backward import linear_backward, linear_reads

    (n, length, h, d, chunk, *_), constants, q = layout, layout.constants(), tokens[0]
    stretches = part.owner.shape[0]
    places = stretches * layout.every
    all_w, d_reads = q.new_empty(places, h, d, d), q.new_empty(places, h, chunk, d)
    wide = kept[0].new_empty
    all_b, units, rows_stats = wide(places, h, d), wide(places, h, chunk, d), wide(places, h, 5, chunk)
    shared = wide(places + n, h, chunk + 2 * d)
    replayed = (all_w, all_b, units, rows_stats)
    layout.launch(
        linear_replay, (stretches, h), *tokens[1:], flags, *kept, part.owner, part.base, *replayed,
        length, n, part.first, eps, h, **constants,
    )  # fmt: skip
    layout.launch(
        linear_reads, (places * h,), dy, *tokens, flags, part.owner, part.base, *replayed, d_reads, *into[:3], shared,
        into.s, into.sb, length, n, part.first, eps, h, **constants,
    )  # fmt: skip
    layout.launch(
        linear_backward, (n * h,), *tokens, flags, part.base, *replayed, d_reads, *(memory or into[4:6]),
        *(sums or into[6:]), *into[1:4], shared[places:], *into[4:], length, part.first, part.stop, len(memory),
        len(sums), h, **constants,
    )  # fmt: skip
    return shared


linear_gradients = torch.library.custom_op("fastweight::ttt_linear_backward", _gradients, mutates_args=())


@linear_gradients.register_fake
def _(dy, memory, sums, q, k, v, rate, tau, ln_weight, ln_bias, s, sb, *rest):
    return [torch.empty_like(x) for x in (q, k, v, rate, tau, ln_weight, ln_bias, s, sb, s, sb)]


def _remember(ctx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb, position, cu_seqlens = tensors
    kept = output[5:]
    ctx.save_for_backward(
        q, k, v, rate, tau, ln_weight, ln_bias, s, sb, position, cu_seqlens, *kept
    )  # fmt: skip
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _pair(given: Sequence[Tensor | None], like: Tensors) -> list[Tensor]:
    """Two gradients, zeros for one that is missing; none where both are."""
    if all(g is None for g in given):
        return []
    return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(given, like, strict=True)]


def _backward(ctx, gradients: Sequence[Tensor | None], run: Run) -> tuple:
    saved = ctx.saved_tensors
    q, state = saved[0], saved[7:9]
    dy, *memory = gradients[:5]
    dy = torch.zeros_like(q) if dy is None else dy.contiguous()
    pairs = [_pair(memory[i : i + 2], state) for i in (0, 2)]
    return (*run(dy, *pairs, *saved, ctx.eps), None, None, None, None)


linear.register_autograd(functools.partial(_backward, run=linear_gradients), setup_context=_remember)
differentiable_linear = differentiable(linear, _run, _remember, functools.partial(_backward, run=_gradients))
