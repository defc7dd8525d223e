"""TTT-Linear's kernels as one differentiable unit, which `torch.compile` does not look into."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, Part, empty_marks, parts
from fastweight.ops.ttt.unit import Run, differentiable

Tensors = tuple[Tensor, ...]


def _run(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w: Tensor, b: Tensor, s: Tensor, sb: Tensor, position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, new W, b, new sums, flags [tokens, H], and, if `keep`, states for the backward pass. All contiguous."""
    from fastweight.ops.ttt.kernels_linear import linear_forward

    layout = Layout.of(q, tau, cu_seqlens)
    results = _empty_results(layout, q, w, b, s, sb, keep=keep)
    with torch.cuda.device_of(q):
        layout.launch(
            linear_forward, (layout.sequences * layout.heads,), q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb,
            position, position if cu_seqlens is None else cu_seqlens, *results, layout.length, eps, layout.heads,
            keep=int(keep), **layout.constants(),
        )  # fmt: skip
    return results


def _empty_results(
    layout: Layout, q: Tensor, w: Tensor, b: Tensor, s: Tensor, sb: Tensor, *, keep: bool
) -> list[Tensor]:
    slots = layout.slots if keep else 0
    flags = empty_marks(q)
    kept = [w.new_empty(slots, *w.shape[1:]), b.new_empty(slots, *b.shape[1:])]
    return [torch.empty_like(q), *[torch.empty_like(x) for x in (w, b, s, sb)], flags, *kept]


linear = torch.library.custom_op("fastweight::ttt_linear", _run, mutates_args=())


@linear.register_fake
def _(q, k, v, rate, tau, ln_weight, ln_bias, w, b, s, sb, position, cu_seqlens, eps, keep):
    return _empty_results(Layout.of(q, tau, cu_seqlens), q, w, b, s, sb, keep=keep)


def _gradients(
    dy: Tensor, memory: list[Tensor], sums: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rate: Tensor,
    tau: Tensor, ln_weight: Tensor, ln_bias: Tensor, s: Tensor, sb: Tensor, position: Tensor,
    cu_seqlens: Tensor | None, flags: Tensor, kept_w: Tensor, kept_b: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, rate, tau, ln_weight, ln_bias, W, b and the sums. memory, sums: those of the results, each
    a pair, or empty for zeros."""
    layout = Layout.of(q, tau, cu_seqlens)
    ends = position if cu_seqlens is None else cu_seqlens
    tokens = (q, k, v, rate, tau, ln_weight, ln_bias, s, sb, position, ends, flags)
    call = _Call(layout, layout.constants(), tokens, (kept_w, kept_b), sums, eps)
    todo = parts(layout, position, cu_seqlens, _bytes_of_one(layout, q))
    into = None
    with torch.cuda.device_of(q):
        for turn, part in enumerate(todo):
            scratch = _replay(call, part)
            into = into or _Gradients.empty(call, len(todo))  # not before the device has something to do
            _walk(call, part, turn, dy, scratch, memory, into)
            memory, scratch = [into.w, into.b], []  # the next part takes their room
        assert into is not None
        totals = layout.share_out(into.shared, tau, ln_weight, ln_bias)
    return [*into[:4], *totals, *into[4:8]]


class _Call(NamedTuple):
    """What the parts of one backward pass have in common. tokens: from q to flags, as kernels take them."""

    layout: Layout
    constants: dict[str, Any]
    tokens: Tensors
    kept: Tensors
    sums: list[Tensor]
    eps: float


class _Gradients(NamedTuple):
    """Where the parts of a backward pass leave their gradients. shared: see `Layout.rows`."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    w: Tensor
    b: Tensor
    s: Tensor
    sb: Tensor
    shared: Tensor

    @staticmethod
    def empty(call: _Call, turns: int) -> "_Gradients":
        q, k, v, rate, *_, s, sb, _, _, _ = call.tokens
        like = [torch.empty_like(x) for x in (q, k, v, rate, s, sb, s, sb)]
        return _Gradients._make([*like, call.layout.rows(s, turns)])


def _bytes_of_one(layout: Layout, q: Tensor) -> int:
    """What one mini-batch of one head takes between the kernels of a part."""
    memory = layout.dim * (layout.dim * q.element_size() + 4)
    return memory + layout.chunk * (layout.dim * (4 + q.element_size()) + 6 * 4) + 8 * layout.dim


def _replay(call: _Call, part: Part) -> list[Tensor]:
    """W, b of the part's mini-batches and what else is known of them; then room for what their reads leave behind."""
    from fastweight.ops.ttt.kernels_linear import linear_replay

    layout, (kept_w, kept_b) = call.layout, call.kept
    stretches, h, d, chunk = part.owner.shape[0], layout.heads, layout.dim, layout.chunk
    places, low, wide = stretches * layout.every, call.tokens[0].new_empty, kept_w.new_empty
    all_w, all_b, units, rows_stats = (
        low(places, h, d, d),
        wide(places, h, d),
        wide(places, h, chunk, d),
        wide(places, h, 5, chunk),
    )
    layout.launch(
        linear_replay, (stretches, h), *call.tokens[1:], kept_w, kept_b, part.owner, part.base, all_w, all_b, units,
        rows_stats, layout.length, layout.sequences, part.first, call.eps, h, **call.constants,
    )  # fmt: skip
    return [all_w, all_b, units, rows_stats, low(places, h, chunk, d), wide(places, h, chunk + 2 * d)]


def _walk(
    call: _Call, part: Part, turn: int, dy: Tensor, scratch: list[Tensor], memory: list[Tensor], into: _Gradients
) -> None:
    """The reads of the part's mini-batches side by side, then the rest one after the other, the last one first."""
    from fastweight.ops.ttt.kernels_linear_backward import linear_backward, linear_reads

    (n, length, h, *_), tokens = call.layout, call.tokens
    call.layout.launch(
        linear_reads, (part.owner.shape[0] * call.layout.every * h,), dy, *tokens, part.owner, part.base, *scratch,
        *into[:3], into.s, into.sb, length, n, part.first, call.eps, h, **call.constants,
    )  # fmt: skip
    call.layout.launch(
        linear_backward, (n * h,), *tokens, part.base, *scratch, *(memory or into[4:6]), *(call.sums or into[6:8]),
        *into[1:4], into.shared, *into[4:8], length, part.first, part.stop, turn, len(memory), len(call.sums), h,
        **call.constants,
    )  # fmt: skip


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
differentiable_linear = differentiable(linear, _run, _remember, functools.partial(_backward, run=_gradients), 6)
