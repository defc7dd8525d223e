"""TTT-MLP's kernels as one differentiable unit, which `torch.compile` does not look into."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, Part, block, empty_marks, parts
from fastweight.ops.ttt.unit import Run, differentiable

Tensors = tuple[Tensor, ...]


def _run(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor,
    position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """y, new W1, b1, W2, b2, new sums, flags [tokens, H], and, if `keep`, states for the backward pass."""
    from fastweight.ops.ttt.kernels_mlp import mlp_forward
    from fastweight.ops.ttt.kernels_mlp_held import mlp_forward_held

    inputs = (q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position)
    results = _results(*inputs, cu_seqlens, eps, keep)
    layout = Layout.of(q, tau, cu_seqlens)
    suspects = torch.empty(layout.sequences, layout.heads, dtype=torch.int32, device=q.device)
    ends, constants = position if cu_seqlens is None else cu_seqlens, layout.constants(w1.shape[-1])
    grid, given = (layout.sequences * layout.heads,), (*inputs, ends, *results[:10], suspects, *results[10:])
    options = {"keep": int(keep), **constants}
    with torch.cuda.device_of(q):
        if layout.held("forward", w1.shape[-1], q.device):
            layout.launch(
                mlp_forward_held, grid, *given, layout.length, eps, layout.heads, **options, WHOLE=block(w1.shape[-1])
            )  # fmt: skip
        else:
            layout.launch(mlp_forward, grid, *given, layout.length, eps, layout.heads, **options, GUARD=False)
        layout.launch(mlp_forward, grid, *given, layout.length, eps, layout.heads, **options, GUARD=True)
    return results


def _results(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor,
    position: Tensor, cu_seqlens: Tensor | None, eps: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    slots = Layout.of(q, tau, cu_seqlens).slots if keep else 0
    flags = empty_marks(q).zero_()
    memory, sums = (w1, b1, w2, b2), (s1, t1, s2, t2)
    kept = [x.new_empty(slots, *x.shape[1:]) for x in memory]
    return [torch.empty_like(q), *(torch.empty_like(x) for x in (*memory, *sums)), flags, *kept]


mlp = torch.library.custom_op("fastweight::ttt_mlp", _run, mutates_args=())
mlp.register_fake(_results)


def _gradients(
    dy: Tensor, memory: list[Tensor], sums: list[Tensor], q: Tensor, k: Tensor, v: Tensor, rate: Tensor,
    tau: Tensor, ln_weight: Tensor, ln_bias: Tensor, s1: Tensor, t1: Tensor, s2: Tensor, t2: Tensor, position: Tensor,
    cu_seqlens: Tensor | None, flags: Tensor, kept: list[Tensor], eps: float, to_sums: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, rate, tau, ln_weight, ln_bias, W1 … b2 and the sums. memory, sums: those of the results,
    each four, or empty for zeros. to_sums: whether anybody asks for those of the sums; they may be anything if not."""
    layout, width, like = Layout.of(q, tau, cu_seqlens), s1.shape[-1], (s1, t1, s2, t2)
    tokens = (
        k, v, rate, tau, ln_weight, ln_bias, *like, position, position if cu_seqlens is None else cu_seqlens, flags
    )  # fmt: skip
    one_part, held = _one_part, layout.held("backward", width, q.device)
    if held:
        one_part = functools.partial(_one_part_held, to_sums=int(to_sums))
    todo = parts(layout, position, cu_seqlens, _bytes_of_one(layout, width, q, held))
    into = _Gradients.empty(layout, todo, (q, k, v, rate), like, memory)
    sums, place = sums or [torch.zeros_like(x) for x in like], 0
    with torch.cuda.device_of(q):
        for part in todo:
            one_part(layout, width, part, place, dy, q, tokens, sums, kept, eps, into)
            place += part.owner.shape[0] * layout.every
    of_tau = into.tau.sum((0, 1))
    of_tau[-1] += into.last.sum()
    shared = (of_tau, into.gamma.sum(0), into.beta.sum(0))
    shared = [total.to(x.dtype) for total, x in zip(shared, (tau, ln_weight, ln_bias), strict=True)]
    return [into.q, into.k, into.v, into.rate, *shared, *into.memory, *into.sums]


class _Gradients(NamedTuple):
    """Where the parts of a backward pass leave their gradients. tau: [places, H, CHUNK], without `last` [N, H]; gamma,
    beta: [places + N, H, D], zero where a place has no mini-batch; the last N rows are those of the sequences."""

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

    @staticmethod
    def empty(layout: Layout, todo: list[Part], tokens: Tensors, like: Tensors, memory: list[Tensor]) -> "_Gradients":
        n, h, d = layout.sequences, layout.heads, layout.dim
        places, zeros = sum(part.owner.shape[0] for part in todo) * layout.every, like[0].new_zeros
        memory = [x.clone() for x in memory] or [torch.zeros_like(x) for x in like]
        shared = [zeros(places, h, layout.chunk), zeros(n, h), zeros(places + n, h, d), zeros(places + n, h, d)]
        tokens = tuple([torch.empty_like(x) for x in tokens])
        return _Gradients._make([*tokens, *shared, memory, [torch.empty_like(x) for x in like]])


def _bytes_of_one(layout: Layout, width: int, q: Tensor, held: bool) -> int:
    """What one mini-batch of one head takes between the kernels of a part."""
    if held:
        vectors = 4 * (3 * width + 4 * layout.dim + layout.chunk)
        tiles = layout.chunk * (4 * (5 * layout.dim + 8) + q.element_size() * (layout.dim + 9 * width))
        return vectors + tiles + q.element_size() * 2 * layout.dim * width
    memory = 4 * (2 * layout.dim * width + width + layout.dim)
    return memory + layout.chunk * (3 * 4 * layout.dim + q.element_size() * (layout.dim + 4 * width))


def _one_part(
    layout: Layout, width: int, part: Part, first: int, dy: Tensor, q: Tensor, tokens: Tensors, sums: list[Tensor],
    kept: list[Tensor], eps: float, into: _Gradients,
) -> None:  # fmt: skip
    """Replay the part's mini-batches, then their reads side by side, then the rest one after the other.

    first: the place of the part's first mini-batch among those of all parts.
    """
    from fastweight.ops.ttt.kernels_mlp import mlp_replay
    from fastweight.ops.ttt.kernels_mlp_backward import mlp_backward, mlp_reads

    h, d, constants = layout.heads, layout.dim, layout.constants(width)
    stretches = part.owner.shape[0]
    places = (stretches * layout.every, h)
    memory = [kept[0].new_empty(*places, *x.shape[2:]) for x in kept]
    wide = [kept[0].new_empty(*places, layout.chunk, d) for _ in range(3)]
    narrow = [q.new_empty(*places, layout.chunk, size) for size in (d, width, width, width, width)]
    scratch = (wide[0], narrow[0], *wide[1:], *narrow[1:])
    shared, own = (into.tau[first:], into.gamma[first:], into.beta[first:]), -layout.sequences
    layout.launch(
        mlp_replay, (stretches, h), *tokens, *kept, part.owner, part.base, *memory,
        layout.length, layout.sequences, part.first, eps, h, **constants,
    )  # fmt: skip
    layout.launch(
        mlp_reads, places, dy, q, *tokens, part.owner, part.base, *memory, *scratch, into.q, *shared, *into.sums,
        layout.length, layout.sequences, part.first, eps, h, **constants,
    )  # fmt: skip
    layout.launch(
        mlp_backward, (layout.sequences * h,), q, *tokens, part.base, *memory, *scratch, *sums, into.k, into.v,
        into.rate, into.last, into.gamma[own:], into.beta[own:], *into.memory, *into.sums,
        layout.length, part.first, part.stop, eps, h, **constants,
    )  # fmt: skip


def _one_part_held(
    layout: Layout, width: int, part: Part, first: int, dy: Tensor, q: Tensor, tokens: Tensors, sums: list[Tensor],
    kept: list[Tensor], eps: float, into: _Gradients, to_sums: int,
) -> None:  # fmt: skip
    """As `_one_part`, with the memory in registers. Products of gradients with W1 come last, again side by side.

    to_sums: 1 if somebody asks for the gradients of the sums.
    """
    from fastweight.ops.ttt.kernels_mlp_held import mlp_replay_held
    from fastweight.ops.ttt.kernels_mlp_held_backward import mlp_keys_held, mlp_reads_held
    from fastweight.ops.ttt.kernels_mlp_held_walk import mlp_end_held, mlp_walk_held

    n, h, d, chunk, constants = layout.sequences, layout.heads, layout.dim, layout.chunk, layout.held_constants(width)
    folding = constants | {"WARPS": layout.warps}
    k, _v, rate, tau, ln_weight, _ln_bias, s1, t1, s2, t2, position, ends, flags = tokens
    stretches = part.owner.shape[0]
    places, empty = (stretches * layout.every, h), kept[0].new_empty
    firsts, seconds = (q.new_empty(*places, d, width) for _ in range(2))
    biases1, totals1, middles1 = (empty(*places, width) for _ in range(3))
    biases2, reads2 = (empty(*places, d) for _ in range(2))
    d_keys, pulled = (empty(*places, chunk, d) for _ in range(2))
    statistics, d_reads = empty(*places, chunk, 8), q.new_empty(*places, chunk, d)
    xs, writes1, actives, d_middles, d_z1 = (q.new_empty(*places, chunk, width) for _ in range(5))
    wide, tile = constants["BLOCK_K"] * constants["BLOCK_D"], constants["BLOCK_K"] * constants["WHOLE"]
    units, grads2, d_writes2 = (empty(*places, wide) for _ in range(3))
    slopes, bends, below1, errors = (q.new_empty(*places, tile) for _ in range(4))
    shared, own = (into.tau[first:], into.gamma[first:], into.beta[first:]), -n
    where, sizes = (part.owner, part.base), (layout.length, n, part.first)
    hidden = (xs, writes1, slopes, bends)
    layout.launch(
        mlp_replay_held, (stretches, h), *tokens, *kept, *where, firsts, biases1, seconds, biases2, totals1, units,
        grads2, statistics, *hidden, *sizes, eps, h, **folding,
    )  # fmt: skip
    for opening in (False, True) if part.first == 0 else (False,):
        grid = (n, h) if opening else (places[0] // layout.reads, h)
        layout.launch(
            mlp_reads_held, grid, dy, q, k, rate, tau, ln_weight, s1, t1, s2, t2, position, ends, flags, *where,
            firsts, biases1, seconds, biases2, grads2, *hidden, d_reads, d_writes2, d_keys, actives, d_middles, below1,
            errors, middles1, reads2, into.q, *shared, *into.sums, *sizes, to_sums, eps, h,
            **folding, STEP=layout.reads, OPENING=opening,
        )  # fmt: skip
    given = (
        q, *tokens, part.base, seconds, totals1, units, grads2, statistics, *hidden, d_reads, d_writes2,
        actives, d_middles, below1, errors, middles1, reads2, pulled, d_z1, *sums, into.v, into.rate, into.last,
        into.gamma[own:], into.beta[own:], *into.memory, *into.sums, layout.length, part.first, part.stop, to_sums, h,
    )  # fmt: skip
    if layout.packed or part.stop > layout.length // chunk:
        layout.launch(mlp_end_held, (n * h,), *given, **folding, UNFINISHED=True)
    layout.launch(mlp_walk_held, (n * h,), *given, **folding)
    if part.first == 0:
        layout.launch(mlp_end_held, (n * h,), *given, **folding, UNFINISHED=False)
    layout.launch(
        mlp_keys_held, places, position, ends, *where, firsts, d_keys, pulled, d_z1, into.k, *sizes, h, **constants
    )  # fmt: skip


mlp_gradients = torch.library.custom_op("fastweight::ttt_mlp_backward", _gradients, mutates_args=())


@mlp_gradients.register_fake
def _(dy, memory, sums, q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, *rest):
    return [torch.empty_like(x) for x in (q, k, v, rate, tau, ln_weight, ln_bias, *(s1, t1, s2, t2) * 2)]


def _remember(ctx, inputs: tuple, output: list[Tensor]) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors[:7], *tensors[11:], *output[9:])
    ctx.mark_non_differentiable(*output[9:])
    ctx.set_materialize_grads(False)


def _four(given: Sequence[Tensor | None], like: Tensors) -> list[Tensor]:
    """Four gradients, zeros for those that are missing; none where all are."""
    if all(g is None for g in given):
        return []
    return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(given, like, strict=True)]


def _backward(ctx, gradients: Sequence[Tensor | None], run: Run) -> tuple:
    saved = ctx.saved_tensors
    q, like = saved[0], saved[7:11]
    dy, *given = gradients[:9]
    dy = torch.zeros_like(q) if dy is None else dy.contiguous()
    asked = any(ctx.needs_input_grad[11:15])
    found = run(dy, _four(given[:4], like), _four(given[4:], like), *saved[:14], list(saved[14:]), ctx.eps, asked)
    return (*(found if asked else [*found[:11], None, None, None, None]), None, None, None, None)


mlp.register_autograd(functools.partial(_backward, run=mlp_gradients), setup_context=_remember)
differentiable_mlp = differentiable(mlp, _run, _remember, functools.partial(_backward, run=_gradients), 10)
