"""The pieces in Triton: how their kernels are launched, with which tiles, and which of them are used at all."""

from typing import Any

import torch
from torch import Tensor

from fastweight.ops.lact import kernels_pieces
from fastweight.ops.lact.fused_muon import iterates, orthogonalise, orthogonalise_gradient, parts_of, power
from fastweight.ops.lact.grid import Carry, Shape
from fastweight.ops.lact.layout import Layout
from fastweight.ops.lact.pieces import TORCH, Pieces
from fastweight.ops.launch import launch
from fastweight.state import Faults

# Kernels as the launcher sees them: tensors and numbers in, which their own signatures do not say.
_PIECES: Any = kernels_pieces

# Some kernels are started by `launch`, which spares the host: those that no recorded graph starts.
# What is measured and chosen on a GPU stands here and in FUSED: to time a piece without its kernel, put TORCH's there.
HIDDEN_TILE = (8, 128)  # rows and columns of the hidden layer
SWAP_TILE = (2048, 128)  # elements that change places, and columns at most
FINITE_TILE = 4096  # elements, whole rows
COUNT_TILE = 64  # chunks whose updates are counted at once
ROWS = 4  # of a matrix, in what needs their norms
FLAT = 1024  # elements


def swap(t: Tensor, dtype: torch.dtype, good: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    rows, first, second, dim = t.shape
    out = t.new_empty(rows, second, first, dim, dtype=dtype) if out is None else out
    t = t if t.stride(-1) == 1 else t.contiguous()
    count, masked = rows * first * second, good is not None
    columns = min(power(dim), SWAP_TILE[1])
    tile = SWAP_TILE[0] // columns
    launch(
        _PIECES.swap, (parts_of(count, tile), parts_of(dim, columns)),
        (t, out, good.view(torch.uint8) if good is not None else t), (first, second, count, *t.stride()[:3]),
        {"D": dim, "MASKED": masked, "ROWS": tile, "BLOCK": columns}, {},
    )  # fmt: skip
    return out


def keep_finite(t: Tensor, good: Tensor) -> None:
    chunks, tokens, heads, dim = t.shape
    t = t if t.stride(-1) == 1 else t.contiguous()
    columns = power(dim)
    tile = max(1, FINITE_TILE // columns)
    launch(
        _PIECES.keep_finite, (chunks * parts_of(tokens * heads, tile),), (t, good.view(torch.uint8)),
        (tokens * heads, heads, *t.stride()[:3]), {"D": dim, "ROWS": tile, "BLOCK": columns}, {},
    )  # fmt: skip


def count_refused(faults: Faults, good: Tensor, layout: Layout) -> Faults:
    """As `layout.count`."""
    given = [layout.row, layout.number, layout.plan.order, layout.started, *(t.contiguous() for t in faults)]
    count, first = results = [torch.empty_like(t) for t in given[-2:]]
    launch(
        _PIECES.count_refused, (len(count),),
        (layout.due.view(torch.uint8), good.view(torch.uint8), *given, *results),
        (len(good), layout.plan.chunk_size), {"BLOCK": COUNT_TILE}, {"num_warps": 1},
    )  # fmt: skip
    return Faults(count, first)


def swiglu(both: Tensor, lr: Tensor | None = None) -> Tensor:
    if lr is not None and lr.shape[-1] > 1:
        return TORCH.swiglu(both, lr)
    hidden = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    rows, columns = HIDDEN_TILE
    count, width = hidden[..., 0].numel(), hidden.shape[-1]
    grid = (parts_of(count, rows), parts_of(width, columns))
    _PIECES.swiglu[grid](
        both, hidden, both if lr is None else lr, count, both.shape[-2], F=width, RATES=lr is not None, ROWS=rows,
        BLOCK=columns,
    )  # fmt: skip
    return hidden


def swiglu_gradient(both: Tensor, g: Tensor, lr: Tensor | None) -> tuple[Tensor, Tensor]:
    """In place."""
    rows, columns = HIDDEN_TILE
    count, width = g[..., 0].numel(), g.shape[-1]
    grid = (parts_of(count, rows), parts_of(width, columns))
    _PIECES.swiglu_gradient[grid](
        both, g, g if lr is None else lr, count, g.shape[-2], F=width, RATES=lr is not None, ROWS=rows, BLOCK=columns
    )
    return both, g


def swiglu_second(left: Tensor, right: Tensor, lr: Tensor, good: Tensor, of_lr: Tensor) -> tuple[Tensor, Tensor]:
    """In place."""
    rows, columns = HIDDEN_TILE
    count, width = right[..., 0].numel(), right.shape[-1] // 2
    _PIECES.swiglu_second[(parts_of(count, rows),)](
        left, right, lr, good.view(torch.uint8), of_lr, count, left.shape[-2], left.shape[1],
        F=width, ROWS=rows, BLOCK=columns,
    )  # fmt: skip
    return left, right


def hidden_second(both: Tensor, asked: Tensor, lr: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place. lr: the second of three rates [R, H, C, 1] in [R, H, 3, C, 1]."""
    rows, columns = HIDDEN_TILE
    if lr.shape[-1] > 1:
        return TORCH.hidden_second(both, asked, lr, good)
    count, width, rates = asked[..., 0].numel(), asked.shape[-1], lr.new_empty(lr.shape)
    _PIECES.hidden_second[(parts_of(count, rows),)](
        both, asked, lr, good.view(torch.uint8), rates, count, both.shape[-2], both.shape[1],
        F=width, ROWS=rows, BLOCK=columns,
    )  # fmt: skip
    return asked, both, rates


def move(
    direction: tuple[Tensor | None, Tensor], momentum: Tensor | None, beta: Tensor | None, moved: Tensor
) -> Tensor:
    """As in `pieces`, but the sum of squares comes in parts: [rows, H, parts]."""
    inner, outer = direction
    rows, heads, size = moved.shape
    cut = size - outer[0, 0].numel()
    parts = parts_of(size, FLAT)
    energy = moved.new_empty(rows, heads, parts)
    first = outer if inner is None else inner
    _PIECES.move[(parts, rows * heads)](
        first, outer, moved if momentum is None else momentum, moved if beta is None else beta, moved, energy,
        0 if momentum is None else momentum.stride(1), first.stride(1), outer.stride(1),
        CUT=cut, SIZE=size, MOMENTUM=momentum is not None, BLOCK=FLAT,
    )  # fmt: skip
    return energy


def move_rows(
    direction: tuple[Tensor | None, Tensor], momentum: Tensor | None, beta: Tensor | None, moved: Tensor, base: Tensor,
    raw: Tensor, norm: Tensor, shape: Shape,
) -> Tensor:  # fmt: skip
    """As in `pieces`, but the sum of squares comes in parts: [rows, H, parts]."""
    inner, outer = direction
    rows, heads, size = raw.shape
    first = outer if inner is None else inner
    found = [(*matrix, parts_of(matrix[-1], ROWS)) for matrix in _matrices(raw, shape)]
    energy = raw.new_empty(rows, heads, sum(programs for *_, programs in found))
    done = 0
    for offset, length, first_row, number, programs in found:
        _PIECES.move_rows[(programs, rows * heads)](
            first, outer, moved if momentum is None else momentum, moved if beta is None else beta, base, moved, raw,
            norm, energy, 0 if momentum is None else momentum.stride(1), first.stride(1), outer.stride(1),
            base.stride(1), CUT=size - outer[0, 0].numel(), SIZE=size, OFFSET=offset, LENGTH=length, FIRST=first_row,
            NUMBER=number, ALL=norm.shape[-1], PART=done, PARTS=energy.shape[-1], MOMENTUM=momentum is not None,
            ROWS=ROWS, BLOCK=power(length),
        )  # fmt: skip
        done += programs
    return energy


def add_rows(stepped: Tensor, base: Tensor, raw: Tensor, norm: Tensor, shape: Shape) -> None:
    rows, heads, size = raw.shape
    for offset, length, first, number in _matrices(raw, shape):
        _PIECES.add_rows[(parts_of(number, ROWS), rows * heads)](
            stepped, base, raw, norm, base.stride(1), SIZE=size, OFFSET=offset, LENGTH=length, FIRST=first,
            NUMBER=number, ALL=norm.shape[-1], ROWS=ROWS, BLOCK=power(length),
        )  # fmt: skip


def settle(
    carry: Carry, moved: Tensor, energy: Tensor, raw: Tensor, norm: Tensor, target: Tensor, due: Tensor, low: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, heads, size = raw.shape
    weights, good = torch.empty_like(raw), torch.empty_like(due)
    momentum = moved if carry.momentum is None else carry.momentum
    accumulator = raw if carry.accumulator is None else carry.accumulator
    _PIECES.settle[(parts_of(size, FLAT), rows * heads)](
        carry.weights, momentum, accumulator, moved, raw, energy, norm, target, due.view(torch.uint8), weights, low,
        good.view(torch.uint8), carry.weights.stride(1), momentum.stride(1), accumulator.stride(1), low.stride(1),
        heads, energy.shape[-1], CUT=size - shape.dim * shape.hidden, SIZE=size, D=shape.dim, F=shape.hidden,
        ALL=norm.shape[-1], MOMENTUM=carry.momentum is not None, ACCUMULATOR=carry.accumulator is not None, BLOCK=FLAT,
    )  # fmt: skip
    return weights, good


def unsettle(
    weights: Tensor, raw: Tensor, norm: Tensor, target: Tensor, accumulator: Tensor | None, good: Tensor, now: Tensor,
    of_target: Tensor, shape: Shape,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    rows, heads, size = raw.shape
    out, passed = torch.empty_like(raw), None if accumulator is None else torch.empty_like(raw)
    for offset, length, first, number in _matrices(raw, shape):
        _PIECES.unsettle[(parts_of(number, ROWS), rows * heads)](
            weights, raw, norm, target, raw if accumulator is None else accumulator, good.view(torch.uint8), out,
            out if passed is None else passed, now, of_target, weights.stride(1), now.stride(1), heads, SIZE=size,
            OFFSET=offset, LENGTH=length, FIRST=first, NUMBER=number, ALL=norm.shape[-1],
            ACCUMULATOR=accumulator is not None, ROWS=ROWS, BLOCK=power(length),
        )  # fmt: skip
    return out, passed


def unmove(
    moved: Tensor, momentum: Tensor | None, beta: Tensor | None, before: Tensor, good: Tensor, direction: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    rows, heads, size = moved.shape
    parts = parts_of(size, FLAT)
    after = None if momentum is None else torch.empty_like(before)
    of_beta = before.new_empty(rows, heads, parts)
    _PIECES.unmove[(parts, rows * heads)](
        moved, moved if momentum is None else momentum, before if beta is None else beta, before,
        good.view(torch.uint8), direction, before if after is None else after, of_beta,
        0 if momentum is None else momentum.stride(1), heads, SIZE=size, MOMENTUM=momentum is not None, BLOCK=FLAT,
    )  # fmt: skip
    return after, None if momentum is None else of_beta.sum(-1)


def _matrices(flat: Tensor, shape: Shape) -> list[tuple[int, int, int, int]]:
    """(offset, row length, first row, rows) of the runs of rows of one length in flat learned weights."""
    dim, hidden, size = shape.dim, shape.hidden, flat.shape[-1]
    outer = size - dim * hidden
    if outer == 0:
        return [(0, hidden, 0, dim)]
    if dim == hidden:
        return [(0, dim, 0, 3 * dim)]
    return [(0, dim, 0, 2 * hidden), (outer, hidden, 2 * hidden, dim)]


FUSED = Pieces(
    swiglu, swiglu_gradient, swiglu_second, hidden_second, move, move_rows, add_rows, settle, unsettle, unmove,
    orthogonalise, iterates, orthogonalise_gradient, swap, keep_finite,
)  # fmt: skip
