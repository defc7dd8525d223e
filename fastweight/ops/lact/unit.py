"""One LaCT call on a grid of chunks as one differentiable operator, forward and backward written by hand.

It is registered with PyTorch (`fastweight::lact_chunks`), so that torch.compile takes it as it is; what is not traced
goes a shorter way (`_Eager`) in half of the host's time. There are no second derivatives. The weights' recurrence is
sequential, all else is one batched product over the chunks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from fastweight.ops.dispatch import without_autocast
from fastweight.ops.lact import Rule, backward, forward
from fastweight.ops.lact.backward import Gradients
from fastweight.ops.lact.grid import Memory, Tokens, Trail, learnable, make_grid
from fastweight.ops.lact.newton_schulz import COEFFICIENTS
from fastweight.ops.lact.pieces import TORCH, Pieces


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

    def dtype(self, tokens: Tokens, memory: Memory) -> torch.dtype:
        """Of products."""
        return memory.norms.dtype if self.precise else tokens.k.dtype


def run(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, memory: Memory, settings: Settings
) -> tuple[Tensor, Memory, Tensor]:
    """(y [R, C, H, D], the memory at the end, [R] bool: which updates happened).

    q, k, v: [R, C, H, D], chunks as a `ChunkPlan` lays them, and memory's rows in its order. lr: [R, C, H, 3, 1 or D].
    beta: [R, C, H] or None, momentum coefficients. due: [R], which chunks an update may follow.
    """
    if traced():
        found = lact_chunks(q, k, v, lr, beta, due, *memory, *settings)[:5]
    elif settings.save:
        found = _Eager.apply(settings, q, k, v, lr, beta, due, *memory)
    else:
        y, end, good, _ = _forward(Tokens(q, k, v, lr, beta, due), memory, settings)
        found = y, end.weights, end.momentum, end.accumulator, good
    y, weights, momentum, accumulator, good = found
    end = Memory(
        weights, memory.norms, None if memory.momentum is None else momentum,
        None if memory.accumulator is None else accumulator,
    )  # fmt: skip
    return y, end, good


def traced() -> bool:
    """Whether what is called now is written down, or counted, in place of being run alone."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


@torch.library.custom_op("fastweight::lact_chunks", mutates_args=())
def lact_chunks(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, weights: Tensor, norms: Tensor,
    momentum: Tensor | None, accumulator: Tensor | None, active: Sequence[int], muon: str, muon_dtype: str,
    prenorm: bool, update: str, precise: bool, fused: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    """[y, weights, momentum, accumulator, which updates happened, *Trail]; empty tensors where there is none."""
    settings = Settings(list(active), muon, muon_dtype, prenorm, update, precise, fused, save)
    tokens, memory = Tokens(q, k, v, lr, beta, due), Memory(weights, norms, momentum, accumulator)
    y, end, good, trail = _forward(tokens, memory, settings)
    results = [y, end.weights, *end[2:], good, *(trail if save else [])]
    return [weights.new_empty(0) if t is None else t for t in results]


@lact_chunks.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor, weights: Tensor, norms: Tensor,
    momentum: Tensor | None, accumulator: Tensor | None, active: Sequence[int], muon: str, muon_dtype: str,
    prenorm: bool, update: str, precise: bool, fused: bool, save: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = weights.dtype if precise else k.dtype
    none = weights.new_empty(0)
    results = [q.new_empty(q.shape, dtype=dtype), torch.empty_like(weights)]
    results += [none if t is None else torch.empty_like(t) for t in (momentum, accumulator)]
    results.append(torch.empty_like(due))
    if save:
        rule = Rule(q.shape[1], muon, muon_dtype, prenorm, update)
        queries = q.transpose(1, 2).to(dtype)
        results += forward.empty_trail(queries, Memory(weights, norms, momentum, accumulator), rule, save=True)
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
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, kept: Sequence[Tensor],
    active: Sequence[int], muon: str, muon_dtype: str, prenorm: bool, update: str, precise: bool, fused: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, lr, beta, weights, norms, momentum and accumulator from those of y and of the memory."""
    settings = Settings(list(active), muon, muon_dtype, prenorm, update, precise, fused, save=True)
    tokens, end = Tokens(q, k, v, lr, beta, good), Memory(weights, norms, momentum, accumulator)
    found = _backward(tokens, Trail._make(kept), good, y, end, settings)
    return [norms.new_empty(0) if t is None else t for t in (*found[:5], *found.memory)]


@lact_chunks_gradient.register_fake
def _(
    y: Tensor, weights: Tensor, momentum: Tensor | None, accumulator: Tensor | None, norms: Tensor, good: Tensor,
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, kept: Sequence[Tensor],
    active: Sequence[int], muon: str, muon_dtype: str, prenorm: bool, update: str, precise: bool, fused: bool,
) -> list[Tensor]:  # fmt: skip
    dtype = norms.dtype if precise else k.dtype
    none = norms.new_empty(0)
    tokens = [t.new_empty(t.shape, dtype=dtype) for t in (q, k, v)]
    memory = [none if t is None else torch.empty_like(t) for t in (momentum, accumulator)]
    of_beta = none if beta is None else beta.new_empty(beta.shape)
    return [*tokens, lr.new_empty(lr.shape), of_beta, torch.empty_like(weights), torch.empty_like(norms), *memory]


def _forward(tokens: Tokens, memory: Memory, settings: Settings) -> tuple[Tensor, Memory, Tensor, Trail]:
    """`forward_pass`, replayed where it is recorded."""
    with torch.cuda.device_of(tokens.q), without_autocast(tokens.q.device.type):
        desk = recorded.find(tokens, memory, settings)
        if desk is None:
            return forward_pass(tokens, memory, settings)
        return desk.forward(tokens, memory, save=settings.save)


def _backward(tokens: Tokens, trail: Trail, good: Tensor, y: Tensor, end: Memory, settings: Settings) -> Gradients:
    """`backward_pass`, replayed where it is recorded."""
    with torch.cuda.device_of(tokens.q), without_autocast(tokens.q.device.type):
        desk = recorded.find(tokens, end, settings, again=True)
        if desk is None:
            return backward_pass(tokens, trail, good, y, end, settings=settings)
        return desk.backward(tokens, trail, good, y, end)


def forward_pass(tokens: Tokens, memory: Memory, settings: Settings) -> tuple[Tensor, Memory, Tensor, Trail]:
    """y [R, C, H, D], the memory at the end, which updates happened, the trail."""
    p = settings.pieces()
    grid = make_grid(tokens, learnable(tokens, p), settings.dtype(tokens, memory), p)
    rows = settings.rows(len(tokens.q), len(memory.weights))
    rule = settings.rule(tokens.q.shape[1])
    y, end, good, trail = forward.run(grid, memory, rule, rows, p, save=settings.save)
    return p.swap(y, y.dtype), end, good, trail


def backward_pass(
    tokens: Tokens, trail: Trail, good: Tensor, y: Tensor, end: Memory, *, settings: Settings
) -> Gradients:
    """Gradients of the tokens, as they are laid out, and of the memory at the start."""
    p = settings.pieces()
    grid = make_grid(tokens, good, settings.dtype(tokens, end), p)
    rows = settings.rows(len(tokens.q), len(end.norms))
    low = p.swap(y, grid.q.dtype)
    found = backward.run(grid, trail, end.norms, good, low, end, settings.rule(y.shape[1]), rows, p)
    return as_given(found, y.shape[1], p)


def as_given(found: Gradients, size: int, p: Pieces) -> Gradients:
    """Gradients of the grid as those of the tokens: [R, C, H, …]; each of a chunk's coefficients has its share."""
    beta = found.beta
    if beta is not None:
        beta = (beta / size)[:, None].expand(-1, size, -1).contiguous()
    q, k, v = (p.swap(t, t.dtype) for t in found[:3])
    return Gradients(q, k, v, found.lr.permute(0, 3, 1, 2, 4).contiguous(), beta, found.memory)


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    ctx.settings = Settings(*inputs[10:])
    ctx.given = [t is not None for t in inputs[:10]]
    ctx.memory = [_about(t) if there else None for t, there in zip(output[1:4], (True, *ctx.given[8:]), strict=True)]
    ctx.save_for_backward(*inputs[:5], inputs[7], *output[4:])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple:
    saved = ctx.saved_tensors  # read once: where activations are computed again, a second look is refused
    *tokens, norms, good = saved[:7]
    y, end = _asked(grads, tokens[0], ctx.memory)
    s = ctx.settings
    found = lact_chunks_gradient(y, *end, norms, good, *tokens, list(saved[7:]), *s[:-1])
    of_tokens = [None if t is None else g.to(t.dtype) for g, t in zip(found[:5], tokens, strict=True)]
    state = [t if there else None for t, there in zip(found[5:], ctx.given[6:], strict=True)]
    return *of_tokens, None, *state, None if s.active else [], *[None] * 7


def _asked(
    grads: Sequence[Tensor | None], q: Tensor, memory: Sequence[tuple | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of y and of (weights, momentum, accumulator), zeros where nobody asked; None for what there is not.

    memory: `_about` each of the three, or None.
    """
    y, *others = grads[:4]
    end: list[Tensor | None] = []
    for grad, about in zip(others, memory, strict=True):
        if about is None:
            end.append(None)
        elif grad is None:
            shape, dtype, device = about
            end.append(torch.zeros(shape, dtype=dtype, device=device))
        else:
            end.append(grad.contiguous())
    return torch.zeros_like(q) if y is None else y, end


def _about(t: Tensor) -> tuple:
    return t.shape, t.dtype, t.device


class _Eager(torch.autograd.Function):
    """The same as `lact_chunks`, without what torch.compile needs."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, beta: Tensor | None, due: Tensor,
        weights: Tensor, norms: Tensor, momentum: Tensor | None, accumulator: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        tokens, memory = Tokens(q, k, v, lr, beta, due), Memory(weights, norms, momentum, accumulator)
        y, end, good, trail = _forward(tokens, memory, settings)
        ctx.settings = settings
        ctx.memory = [None if t is None else _about(t) for t in (weights, momentum, accumulator)]
        ctx.save_for_backward(*tokens[:5], norms, good, *trail)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(good)
        return y, end.weights, end.momentum, end.accumulator, good

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        *tokens, norms, good = saved[:7]
        y, (weights, momentum, accumulator) = _asked(grads, tokens[0], ctx.memory)
        assert weights is not None
        end = Memory(weights, norms, momentum, accumulator)
        found = _backward(Tokens._make((*tokens, good)), Trail._make(saved[7:]), good, y, end, ctx.settings)
        of_tokens = [None if g is None else g.to(t.dtype) for g, t in zip(found[:5], tokens, strict=True)]
        return None, *of_tokens, None, *found.memory


lact_chunks.register_autograd(_gradient, setup_context=_save)


from fastweight.ops.lact import recorded  # noqa: E402  # it records the passes above
