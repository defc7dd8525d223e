"""The pieces in Triton: how their kernels are launched, with which tiles, and which of them are used at all."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.ops.kernels import interpreting
from fastweight.ops.lact import Rule, kernels_muon, kernels_pieces
from fastweight.ops.lact.grid import Carry, Shape
from fastweight.ops.lact.muon import gather, groups, muon_dtype, scatter
from fastweight.ops.lact.newton_schulz import COEFFICIENTS, start, start_gradient
from fastweight.ops.lact.pieces import TORCH, Pieces

# Kernels as the launcher sees them: tensors and numbers in, which their own signatures do not say.
_PIECES: Any = kernels_pieces
_MUON: Any = kernels_muon

STEPS = 3 * len(COEFFICIENTS)


class Tile(NamedTuple):
    """Of a product: rows and columns, inner length of one turn, warps, stages of loads."""

    block: int
    block_k: int
    warps: int
    stages: int


# What is measured and chosen on a GPU stands here and in FUSED: to time a piece without its kernel, put TORCH's there.
MUON_TILES = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 4, 3)}  # by bytes of an element
# Newton–Schulz in one launch where all tiles fit the device at once, else one launch for each of its steps. The one
# launch waits at a barrier over all programs, which no interpreter can try: off until it was measured on a GPU.
ONE_LAUNCH = False
HIDDEN_TILE = (8, 128)  # rows and columns of the hidden layer
ROWS = 4  # of a matrix, in what needs their norms
FLAT = 1024  # elements


def swiglu(both: Tensor) -> Tensor:
    hidden = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    rows, columns = HIDDEN_TILE
    count, width = hidden[..., 0].numel(), hidden.shape[-1]
    grid = (_parts(count, rows), _parts(width, columns))
    _PIECES.swiglu[grid](both, hidden, count, F=width, ROWS=rows, BLOCK=columns)
    return hidden


def swiglu_gradient(both: Tensor, g: Tensor, lr: Tensor | None) -> tuple[Tensor, Tensor]:
    """In place."""
    rows, columns = HIDDEN_TILE
    count, width = g[..., 0].numel(), g.shape[-1]
    grid = (_parts(count, rows), _parts(width, columns))
    _PIECES.swiglu_gradient[grid](
        both, g, g if lr is None else lr, count, g.shape[-2], F=width, RATES=lr is not None, ROWS=rows, BLOCK=columns
    )
    return both, g


def swiglu_second(left: Tensor, right: Tensor, lr: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place."""
    rows, columns = HIDDEN_TILE
    count, width, rates = right[..., 0].numel(), right.shape[-1] // 2, torch.empty_like(lr)
    _PIECES.swiglu_second[(_parts(count, rows),)](
        left, right, lr, good.view(torch.uint8), rates, count, left.shape[-2], left.shape[1],
        F=width, ROWS=rows, BLOCK=columns,
    )  # fmt: skip
    return left, right, rates


def hidden_second(both: Tensor, asked: Tensor, lr: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place. lr: the second of three rates [R, H, C, 1] in [R, H, 3, C, 1]."""
    rows, columns = HIDDEN_TILE
    if lr.shape[-1] > 1:
        return TORCH.hidden_second(both, asked, lr, good)
    count, width, rates = asked[..., 0].numel(), asked.shape[-1], lr.new_empty(lr.shape)
    _PIECES.hidden_second[(_parts(count, rows),)](
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
    parts = _parts(size, FLAT)
    energy = moved.new_empty(rows, heads, parts)
    first = outer if inner is None else inner
    _PIECES.move[(parts, rows * heads)](
        first, outer, moved if momentum is None else momentum, moved if beta is None else beta, moved, energy,
        0 if momentum is None else momentum.stride(1), first.stride(1), outer.stride(1),
        CUT=cut, SIZE=size, MOMENTUM=momentum is not None, BLOCK=FLAT,
    )  # fmt: skip
    return energy


def add_rows(stepped: Tensor, base: Tensor, raw: Tensor, norm: Tensor, shape: Shape) -> None:
    rows, heads, size = raw.shape
    for offset, length, first, number in _matrices(raw, shape):
        _PIECES.add_rows[(_parts(number, ROWS), rows * heads)](
            stepped, base, raw, norm, base.stride(1), SIZE=size, OFFSET=offset, LENGTH=length, FIRST=first,
            NUMBER=number, ALL=norm.shape[-1], ROWS=ROWS, BLOCK=_power(length),
        )  # fmt: skip


def settle(
    carry: Carry, moved: Tensor, energy: Tensor, raw: Tensor, norm: Tensor, target: Tensor, due: Tensor, low: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, heads, size = raw.shape
    weights, good = torch.empty_like(raw), torch.empty_like(due)
    momentum = moved if carry.momentum is None else carry.momentum
    accumulator = raw if carry.accumulator is None else carry.accumulator
    _PIECES.settle[(_parts(size, FLAT), rows * heads)](
        carry.weights, momentum, accumulator, moved, raw, energy, norm, target, due.view(torch.uint8), weights, low,
        good.view(torch.uint8), carry.weights.stride(1), momentum.stride(1), accumulator.stride(1), low.stride(1),
        heads, energy.shape[-1], CUT=size - shape.dim * shape.hidden, SIZE=size, D=shape.dim, F=shape.hidden,
        ALL=norm.shape[-1], MOMENTUM=carry.momentum is not None, ACCUMULATOR=carry.accumulator is not None, BLOCK=FLAT,
    )  # fmt: skip
    return weights, good


def unsettle(
    weights: Tensor, raw: Tensor, norm: Tensor, target: Tensor, accumulator: Tensor | None, good: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    rows, heads, size = raw.shape
    out, of_target = torch.empty_like(raw), torch.empty_like(norm)
    for offset, length, first, number in _matrices(raw, shape):
        _PIECES.unsettle[(_parts(number, ROWS), rows * heads)](
            weights, raw, norm, target, raw if accumulator is None else accumulator, good.view(torch.uint8), out,
            of_target, weights.stride(1), heads, SIZE=size, OFFSET=offset, LENGTH=length, FIRST=first, NUMBER=number,
            ALL=norm.shape[-1], ACCUMULATOR=accumulator is not None, ROWS=ROWS, BLOCK=_power(length),
        )  # fmt: skip
    return out, of_target


def unmove(
    moved: Tensor, momentum: Tensor | None, beta: Tensor | None, before: Tensor, good: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, heads, size = moved.shape
    parts = _parts(size, FLAT)
    direction = torch.empty_like(before)
    after = None if momentum is None else torch.empty_like(before)
    of_beta = before.new_empty(rows, heads, parts)
    _PIECES.unmove[(parts, rows * heads)](
        moved, moved if momentum is None else momentum, before if beta is None else beta, before,
        good.view(torch.uint8), direction, direction if after is None else after, of_beta,
        0 if momentum is None else momentum.stride(1), heads, SIZE=size, MOMENTUM=momentum is not None, BLOCK=FLAT,
    )  # fmt: skip
    return direction, after, None if momentum is None else of_beta.sum(-1)


def orthogonalise(flat: Tensor, rule: Rule, shape: Shape, trail: Tensor | None) -> Tensor:
    """As in `muon`; iterates in float32 are multiplied as three TensorFloat32 parts, exactly for float32 tokens."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    trail = flat.new_empty(5, *flat.shape, dtype=muon_dtype(rule, flat.dtype)) if trail is None else trail
    for group in found:
        x = start(gather(flat, group), rule.muon_dtype)[0]
        xs = trail[..., group.part]
        xs[0] = x.flatten(-3)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        s, p = (out.new_empty(out[..., 0, 0].numel(), x.shape[-2], x.shape[-2]) for _ in range(2))
        precision = "ieee" if shape.exact else "tf32x3"
        _iterate(_MUON.orthogonalise, (xs, out, s, p), (xs.stride(0) // xs.stride(2),), xs, out, 1, precision)
        done.append(out)
    return scatter(done, found)


def orthogonalise_gradient(flat: Tensor, trail: Tensor, grad: Tensor, rule: Rule, shape: Shape) -> Tensor:
    """As in `muon`; float32 is rounded to TensorFloat32 where tokens are not float32."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    for group in found:
        g = gather(grad, group)
        xs = trail[..., group.part]
        both = torch.empty(2, *g.shape, dtype=trail.dtype, device=g.device)
        both[0] = g
        m = g.shape[-2]
        squares = [both.new_empty(g[..., 0, 0].numel(), m, m) for _ in range(4)]
        precision = "ieee" if shape.exact else "tf32"
        numbers = xs.stride(0) // xs.stride(2), g[..., 0, 0].numel()
        _iterate(_MUON.orthogonalise_gradient, (xs, both, *squares), numbers, xs, both[0], 2, precision)
        _, rounded, norm = start(gather(flat, group), rule.muon_dtype)
        done.append(start_gradient(rounded.float(), norm.float(), both[1].float()))
    return scatter(done, found)


def _iterate(kernel: Any, buffers: tuple, numbers: tuple, trail: Tensor, x: Tensor, kinds: int, precision: str) -> None:
    """All steps for matrices x [rows, H, count, m, p]. kinds: of [m, m] results that one step makes."""
    count, m, p = x.shape[2:]
    batch, tile = x[..., 0, 0].numel(), MUON_TILES[x.element_size()]
    square, wide = _parts(m, tile.block), _parts(p, tile.block)
    # In one launch every program of a matrix waits for the others, so all must be on the device together.
    at_once = ONE_LAUNCH and not interpreting() and batch * square * wide <= _processors(x.device)
    programs = square * wide if at_once else square * max(kinds * square, wide)
    counters = torch.zeros(batch, dtype=torch.int32, device=x.device)
    table = _coefficients(x.device)
    for first in (0,) if at_once else range(STEPS):
        kernel[(programs, batch)](
            *buffers, table, counters, *numbers, first, STEPS if at_once else first + 1, BATCH=trail.stride(2),
            COUNT=count, M=m, P=p, BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages, launch_cooperative_grid=at_once,
        )  # fmt: skip


@functools.cache
def _coefficients(device: torch.device) -> Tensor:
    return torch.tensor(COEFFICIENTS, device=device)


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _power(size: int) -> int:
    """The power of two that is no smaller."""
    return 1 << (size - 1).bit_length()


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    swiglu, swiglu_gradient, swiglu_second, hidden_second, move, add_rows, settle, unsettle, unmove, orthogonalise,
    orthogonalise_gradient,
)  # fmt: skip
