"""TTT-MLP's kernels as one differentiable unit, which `torch.compile` does not look into."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, Part, parts

Tensors = tuple[Tensor, ...]


@torch.library.custom_op("fastweight::ttt_mlp", mutates_args=())
def mlp(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor,
    position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, new W1, b1, W2, b2, new sums, flags [tokens, H], and, if `keep`, states for the backward pass."""
    from fastweight.ops.ttt.kernels_mlp import mlp_forward

    inputs = (q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position)
    results = _results(*inputs, cu_seqlens, eps, keep)
    layout = Layout.of(q, tau, cu_seqlens)
    suspects = torch.empty(layout.sequences, layout.heads, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        for guard in (False, True):
            layout.launch(
                mlp_forward, (layout.sequences * layout.heads,), *inputs,
                position if cu_seqlens is None else cu_seqlens, *results[:10], suspects, *results[10:], layout.length,
                eps, layout.heads, keep=int(keep), GUARD=guard, **layout.constants(w1.shape[-1]),
            )  # fmt: skip
    return results


@mlp.register_fake
def _results(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor,
    position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    slots = Layout.of(q, tau, cu_seqlens).slots if keep else 0
    flags = torch.zeros(q.shape[:3], dtype=torch.int8, device=q.device)
    memory, sums = (w1, b1, w2, b2), (s1, t1, s2, t2)
    kept = [x.new_empty(slots, *x.shape[1:]) for x in memory]
    return [torch.empty_like(q), *(torch.empty_like(x) for x in (*memory, *sums)), flags, *kept]


@torch.library.custom_op("fastweight::ttt_mlp_backward", mutates_args=())
def mlp_gradients(
    dy: Tensor, memory: list[Tensor], sums: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rate: Tensor,
    tau: Tensor, ln_weight: Tensor, ln_bias: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor, position: Tensor,
    cu_seqlens: Tensor | None, flags: Tensor, kept: list[Tensor], eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, rate, tau, ln_weight, ln_bias, W1 … b2 and the sums. memory, sums: those of the results."""
    layout, width = Layout.of(q, tau, cu_seqlens), memory[0].shape[-1]
    ends, pairs = position if cu_seqlens is None else cu_seqlens, (layout.sequences, layout.heads)
    tokens = (k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, ends, flags)
    like, zeros = torch.empty_like, memory[0].new_zeros
    into = _Gradients(
        like(q), like(k), like(v), like(rate), zeros(layout.chunk), zeros(pairs), zeros(*pairs, layout.dim),
        zeros(*pairs, layout.dim), [x.clone() for x in memory], [torch.zeros_like(x) for x in (s1, t1, s2, t2)],
    )  # fmt: skip
    with torch.cuda.device_of(q):
        for part in parts(layout, position, cu_seqlens, _bytes_of_one(layout, width, q)):
            _one_part(layout, width, part, dy, q, tokens, sums, kept, eps, into)
    into.tau[-1] += into.last.sum()
    shared = (into.tau, into.gamma.sum(0), into.beta.sum(0))
    shared = [total.to(x.dtype) for total, x in zip(shared, (tau, ln_weight, ln_bias), strict=True)]
    return [into.q, into.k, into.v, into.rate, *shared, *into.memory, *into.sums]


class _Gradients(NamedTuple):
    """Where the parts of a backward pass leave or add up their gradients. tau: [CHUNK], without `last` [N, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    tau: Tensor
    last: Tensor
    gamma: Tensor
    beta: Tensor
    memory: list[Tensor]
    sums: list[Tensor]


def _bytes_of_one(layout: Layout, width: int, q: Tensor) -> int:
    """What one mini-batch of one head takes between the kernels of a part."""
    wide = 4 * (width + layout.dim + layout.chunk * (4 * layout.dim + 1))
    return wide + q.element_size() * (2 * layout.dim * width + layout.chunk * (layout.dim + 8 * width))


def _one_part(
    layout: Layout, width: int, part: Part, dy: Tensor, q: Tensor, tokens: Tensors, sums: list[Tensor],
    kept: list[Tensor], eps: float, into: _Gradients,
) -> None:  # fmt: skip
    """Replay the part's mini-batches, then their reads side by side, then the rest one after the other."""
    from fastweight.ops.ttt.kernels_mlp_backward import mlp_backward
    from fastweight.ops.ttt.kernels_mlp_reads import mlp_keys, mlp_reads, mlp_replay

    n, h, d, chunk, constants = layout.sequences, layout.heads, layout.dim, layout.chunk, layout.constants(width)
    stretches = part.owner.shape[0]
    places, empty = (stretches * layout.every, h), kept[0].new_empty
    w1, b1, w2, b2 = (
        q.new_empty(*places, width, d),
        empty(*places, width),
        q.new_empty(*places, width, d),
        empty(*places, d),
    )
    held = constants["BLOCK_C"] >= width
    running = [empty(0 if held else stretches, h, *x.shape[2:]) for x in kept[:3]]
    units, grads, d_writes, d_keys = (empty(*places, chunk, d) for _ in range(4))
    d_reads, inverses = q.new_empty(*places, chunk, d), empty(*places, chunk)
    turned = [q.new_empty(*places, width, chunk) for _ in range(8)]
    scratch = (units, grads, d_writes, d_keys, d_reads, inverses, *turned)
    shared = [kept[0].new_zeros(*places, size) for size in (chunk, d, d)]
    where, sizes = (part.owner, part.base), (layout.length, n, part.first)
    layout.launch(
        mlp_replay, (stretches, h), *tokens, *kept, *where, w1, b1, w2, b2, *running, *sizes, eps, h, **constants
    )
    for opening in (False, True) if part.first == 0 else (False,):
        layout.launch(
            mlp_reads, (n, h) if opening else places, dy, q, *tokens, *where, w1, b1, w2, b2, *scratch,
            into.q, *shared, *into.sums, *sizes, eps, h, **constants, OPENING=opening,
        )  # fmt: skip
    layout.launch(
        mlp_backward, (n * h,), q, *tokens, part.base, w2, *scratch, *sums, into.v, into.rate, into.last, into.gamma,
        into.beta, *into.memory, *into.sums, layout.length, part.first, part.stop, eps, h, **constants,
    )  # fmt: skip
    position, ends = tokens[10:12]
    layout.launch(
        mlp_keys, places, position, ends, *where, w1, d_keys, turned[-1], into.k, *sizes, h, **constants
    )  # fmt: skip
    into.tau.add_(shared[0].sum((0, 1)))
    # Of the sequences it does not matter which one these belong to: they are summed in the end.
    into.gamma[0] += shared[1].sum(0)
    into.beta[0] += shared[2].sum(0)


@mlp_gradients.register_fake
def _(dy, memory, sums, q, k, v, rate, tau, ln_weight, ln_bias, *rest):
    return [torch.empty_like(x) for x in (q, k, v, rate, tau, ln_weight, ln_bias, *memory, *sums)]


def _remember(ctx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors[:7], *tensors[11:], *output[9:])
    ctx.mark_non_differentiable(*output[9:])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradients: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors
    q, sums = saved[0], saved[7:11]
    given = [
        torch.zeros_like(x) if g is None else g.contiguous()
        for g, x in zip(gradients[:9], (q, *sums, *sums), strict=True)
    ]
    found = mlp_gradients(given[0], given[1:5], given[5:], *saved[:14], list(saved[14:]), ctx.eps)
    return (*found, None, None, None, None)


mlp.register_autograd(_backward, setup_context=_remember)
