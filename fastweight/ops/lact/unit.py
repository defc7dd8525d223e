"""One LaCT call on a grid of chunks as one differentiable operator, forward and backward written by hand.

It is registered with PyTorch (`fastweight::lact_chunks`), so that torch.compile takes it as it is; it has no second
derivatives. The weights' recurrence is sequential, all else is one batched product over the chunks.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastweight.ops.lact import Rule, backward, forward
from fastweight.ops.lact.grid import Grid, Memory, Trail
from fastweight.ops.lact.newton_schulz import COEFFICIENTS
from fastweight.ops.lact.pieces import TORCH, Pieces, only


class Settings(NamedTuple):
    """active: rows that have chunk i, [] if all have all. precise: products in the dtype of the weights, not of k.

    save: keep what the backward pass needs. fused: use Triton kernels.
    """

    active: list[int]
    muon: str
    muon_dtype: str
    prenorm: bool
    update: str
    precise: bool
    fused: bool
    save: bool

    def rule(self, chunk_size: int) -> Rule:
        return Rule(chunk_size, self.muon, self.muon_dtype, self.prenorm, self.update)

    def pieces(self) -> Pieces:
        if not self.fused:
            return TORCH
        from fastweight.ops.lact.fused import FUSED  # needs triton

        return FUSED

    def rows(self, chunks: int, sequences: int) -> list[int]:
        return list(self.active) or [sequences] * (chunks // sequences)


def run(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, memory: Memory, settings: Settings
) -> tuple[Tensor, Memory, Tensor]:
    """(y [R, C, H, D], the memory at the end, [R] bool: which updates happened).

    q, k, v: [R, C, H, D], chunks as a `ChunkPlan` lays them, and memory's rows in its order. lr: [R, C, H, 3, 1 or D].
    beta: [R, C, H] or None, momentum coefficients. due: [R], which chunks an update may follow.
    """
    found = lact_chunks(q, k, v, lr, beta, due, *memory, *settings)
    y, weights, momentum, accumulator, good = found[:5]
    end = Memory(
        weights, memory.norms, None if memory.momentum is None else momentum,
        None if memory.accumulator is None else accumulator,
    )  # fmt: skip
    return y, end, good


@torch.library.custom_op("fastweight::lact_chunks", mutates_args=())
def lact_chunks(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, weights: Tensor, norms: Tensor,
    momentum: Tensor | None, accumulator: Tensor | None, active: Sequence[int], muon: str, muon_dtype: str,
    prenorm: bool, update: str, precise: bool, fused: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """[y, weights, momentum, accumulator, which updates happened, *Grid, *Trail]; empty tensors where there is none."""
    settings = Settings(list(active), muon, muon_dtype, prenorm, update, precise, fused, save)
    grid = _grid(q, k, v, lr, beta, due, weights.dtype if precise else k.dtype)
    memory = Memory(weights, norms, momentum, accumulator)
    rows = settings.rows(q.shape[0], weights.shape[0])
    y, end, good, trail = forward.run(grid, memory, settings.rule(q.shape[1]), rows, settings.pieces(), save=save)
    results = [_swap(y, y.dtype), end.weights, *end[2:], good, *([*grid, *trail] if save else [])]
    return [weights.new_empty(0) if t is None else t for t in results]


@lact_chunks.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, weights: Tensor, norms: Tensor,
    momentum: Tensor | None, accumulator: Tensor | None, active: Sequence[int], muon: str, muon_dtype: str,
    prenorm: bool, update: str, precise: bool, fused: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = weights.dtype if precise else k.dtype
    (chunks, size, heads, dim), rates = q.shape, lr.shape[-1]
    none = weights.new_empty(0)
    results = [q.new_empty(q.shape, dtype=dtype), torch.empty_like(weights)]
    results += [none if t is None else torch.empty_like(t) for t in (momentum, accumulator)]
    results.append(torch.empty_like(due))
    if save:
        results += [q.new_empty(chunks, heads, size, dim, dtype=dtype) for _ in range(3)]
        results.append(lr.new_empty(chunks, heads, 3, size, rates))
        results += [none if beta is None else beta.new_empty(chunks, heads), torch.empty_like(due)]
        rule = Rule(size, muon, muon_dtype, prenorm, update)
        results += forward.empty_trail(results[5], Memory(weights, norms, momentum, accumulator), rule, save=True)
    return results


@register_flop_formula(torch.ops.fastweight.lact_chunks, get_raw=True)
def _operations(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, weights: Tensor, norms: Tensor,
    momentum: Tensor | None, accumulator: Tensor | None, active: Sequence[int], muon: str, muon_dtype: str,
    prenorm: bool, update: str, precise: bool, fused: bool, save: bool, **_: Any,
) -> int:  # fmt: skip
    """Of the products of the forward pass, for torch.utils.flop_counter; asks the device how many updates are due."""
    (chunks, size, heads, dim), updates = q.shape, int(due.sum())
    hidden = weights.shape[-1] // (3 * dim)
    # With w1 alone the directions of all chunks are one product, those of the last chunks with them.
    learned = updates * 12 if update == "all" else chunks * 6
    shapes = [(dim, hidden)] * 3 if update == "all" else [(dim, hidden)]
    if muon == "joint" and update == "all":
        shapes = [(dim, hidden), (dim, 2 * hidden)]
    small = [(min(shape), max(shape)) for shape in shapes]
    iterations = 0 if muon == "none" else sum(4 * m * m * p + 2 * m**3 for m, p in small) * len(COEFFICIENTS)
    return heads * ((6 * chunks + learned) * size * dim * hidden + updates * iterations)


@torch.library.custom_op("fastweight::lact_chunks_gradient", mutates_args=())
def lact_chunks_gradient(
    y: Tensor, weights: Tensor, momentum: Tensor | None, accumulator: Tensor | None, norms: Tensor, good: Tensor,
    kept: Sequence[Tensor], active: Sequence[int], muon: str, muon_dtype: str, prenorm: bool, update: str,
    precise: bool, fused: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, lr, beta, weights, norms, momentum and accumulator from those of y and of the memory."""
    settings = Settings(list(active), muon, muon_dtype, prenorm, update, precise, fused, save=True)
    grid, trail = _restore(kept)
    rows = settings.rows(grid.q.shape[0], norms.shape[0])
    low = _swap(y, grid.q.dtype)
    end = Memory(weights, norms, momentum, accumulator)
    found = backward.run(grid, trail, norms, good, low, end, settings.rule(y.shape[1]), rows, settings.pieces())
    beta = None
    if found.beta is not None:
        beta = (found.beta / y.shape[1])[:, None].expand(-1, y.shape[1], -1).contiguous()
    tokens = [_swap(t, t.dtype) for t in (found.q, found.k, found.v)]
    results = [*tokens, found.lr.permute(0, 3, 1, 2, 4).contiguous(), beta, *found.memory]
    return [norms.new_empty(0) if t is None else t for t in results]


@lact_chunks_gradient.register_fake
def _(
    y: Tensor, weights: Tensor, momentum: Tensor | None, accumulator: Tensor | None, norms: Tensor, good: Tensor,
    kept: Sequence[Tensor], active: Sequence[int], muon: str, muon_dtype: str, prenorm: bool, update: str,
    precise: bool, fused: bool,
) -> list[Tensor]:  # fmt: skip
    grid, _ = _restore(kept)
    chunks, heads, size, dim = grid.q.shape
    tokens = [t.new_empty(chunks, size, heads, dim) for t in (grid.q, grid.k, grid.v)]
    none = norms.new_empty(0)
    beta = none if grid.beta is None else grid.beta.new_empty(chunks, size, heads)
    memory = [none if t is None else torch.empty_like(t) for t in (momentum, accumulator)]
    lr = grid.lr.new_empty(chunks, size, heads, 3, grid.lr.shape[-1])
    return [*tokens, lr, beta, torch.empty_like(weights), torch.empty_like(norms), *memory]


def _restore(kept: Sequence[Tensor]) -> tuple[Grid, Trail]:
    """What the forward pass kept."""
    q, k, v, lr, beta, due, *trail = kept
    return Grid(q, k, v, lr, beta if beta.numel() else None, due), Trail._make(trail)


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.settings = Settings(*inputs[10:])
    ctx.given = [t is not None for t in inputs[:10]]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    ctx.memory = [(t.shape, t.dtype, t.device) for t in output[1:4]]
    ctx.save_for_backward(inputs[7], *output[4:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple:
    norms, good, *kept = ctx.saved_tensors
    y, *memory = grads[:4]
    if y is None:
        chunks, heads, size, dim = kept[0].shape
        y = kept[0].new_zeros(chunks, size, heads, dim)
    given, end = [True, *ctx.given[8:10]], []
    for grad, (shape, dtype, device), there in zip(memory, ctx.memory, given, strict=True):
        grad = torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()
        end.append(grad if there else None)
    s = ctx.settings
    found = lact_chunks_gradient(y, *end, norms, good, kept, *s[:-1])
    tokens = [t.to(dtype) if there else None for t, dtype, there in zip(found[:5], ctx.dtypes, ctx.given, strict=False)]
    state = [t if there else None for t, there in zip(found[5:], ctx.given[6:], strict=True)]
    return *tokens, None, *state, None if s.active else [], *[None] * 7


lact_chunks.register_autograd(_gradient, setup_context=_save)


def _grid(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, dtype: torch.dtype) -> Grid:
    """Heads first, in `dtype`; chunks that hold what is not finite are blank and not learned."""
    ok = due.clone()
    for t in (k, v, lr, beta):
        if t is not None:
            ok &= torch.stack(t.flatten(1).aminmax(dim=1)).isfinite().all(0)

    blank = partial(_swap, good=ok, dtype=dtype)
    rates = only(ok, lr).permute(0, 2, 3, 1, 4).contiguous()
    mean = None if beta is None else only(ok, beta).mean(1)
    return Grid(_swap(q, dtype), blank(k), blank(v), rates, mean, ok)


def _swap(t: Tensor, dtype: torch.dtype, good: Tensor | None = None) -> Tensor:
    """[R, a, b, D] → [R, b, a, D], zero in rows that are not good [R]. Copied: no result of an operator may share
    memory with its inputs."""
    out = t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], dtype=dtype)
    if good is None:
        return out.copy_(t.transpose(1, 2))
    return torch.where(good.view(-1, 1, 1, 1), t.to(dtype).transpose(1, 2), out.new_zeros(()), out=out)
