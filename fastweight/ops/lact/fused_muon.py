"""Newton–Schulz in Triton: how its kernels are launched, forward and backward."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule, kernels_muon
from fastweight.ops.lact.grid import Shape
from fastweight.ops.lact.muon import Group, Iterates, gather, groups, muon_dtype, scatter
from fastweight.ops.lact.newton_schulz import COEFFICIENTS, EPS

# Kernels as the launcher sees them: tensors and numbers in, which their own signatures do not say.
_MUON: Any = kernels_muon


class Tile(NamedTuple):
    """Of a product: rows and columns, inner length of one turn, warps, stages of loads."""

    block: int
    block_k: int
    warps: int
    stages: int


# By bytes of an element. Few matrices are done one step after the other, so a step's latency counts; of many, the rate.
MUON_TILES = {2: Tile(128, 64, 8, 3), 4: Tile(64, 32, 4, 3)}
FLAT = 1024  # elements


def orthogonalise(flat: Tensor, rule: Rule, shape: Shape) -> Tensor:
    """As in `muon`; iterates in float32 are multiplied as three TensorFloat32 parts, exactly for float32 tokens."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    precision = "ieee" if shape.exact else "tf32x3"
    for group in found:
        x = _start(flat, group, rule)[0]
        s, p = (x.new_empty(*x.shape[:-1], x.shape[-2]) for _ in range(2))
        for a, b, c in COEFFICIENTS:
            after = torch.empty_like(x)
            _square(x, s, precision)
            _step((s, s), None, s, p, b, c, precision, turned=True)
            _step((p, x), None, x, after, a, 1.0, precision)
            x = after
        done.append(x)
    return scatter(done, found)


def iterates(flat: Tensor, rule: Rule, shape: Shape) -> list[Iterates]:
    """As in `muon`."""
    made, precision = [], "ieee" if shape.exact else "tf32x3"
    for group in groups(rule, shape.dim, shape.hidden):
        x, norm = _start(flat, group, rule)
        kept = Iterates([x], [], [], norm)
        for number, (a, b, c) in enumerate(COEFFICIENTS):
            x = kept.x[-1]
            s, p = (x.new_empty(*x.shape[:-1], x.shape[-2]) for _ in range(2))
            _square(x, s, precision)
            _step((s, s), None, s, p, b, c, precision, turned=True)
            kept.s.append(s)
            kept.p.append(p)
            if number < len(COEFFICIENTS) - 1:
                after = torch.empty_like(x)
                _step((p, x), None, x, after, a, 1.0, precision)
                kept.x.append(after)
        made.append(kept)
    return made


def orthogonalise_gradient(made: list[Iterates], grad: Tensor, rule: Rule, shape: Shape) -> Tensor:
    """As in `muon`, multiplied as the iterates are: with one TensorFloat32 part gradients were 1.1 % off on an H100."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    precision = "ieee" if shape.exact else "tf32x3"
    for group, kept in zip(found, made, strict=True):
        g = gather(grad, group).to(kept.x[0].dtype)
        g = g if g.is_contiguous() else g.contiguous()
        h, y = (torch.empty_like(kept.s[0]) for _ in range(2))
        for i in reversed(range(len(COEFFICIENTS))):
            (a, b, c), x, s, p = COEFFICIENTS[i], kept.x[i], kept.s[i], kept.p[i]
            after = torch.empty_like(g)
            _step((g, x), (x, g), None, h, 0.0, 1.0, precision, turned=True)
            _step((h, s), (s, h), h, y, b, c, precision, turned=True)  # both symmetric
            _step((p, g), (y, x), g, after, a, 1.0, precision)
            g = after
        done.append(_start_gradient(g, kept))
    return scatter(done, found)


def _square(x: Tensor, s: Tensor, precision: str) -> None:
    _step((x, x), None, None, s, 0.0, 1.0, precision, turned=True)


def _step(
    pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None, base: Tensor | None, out: Tensor, of_base: float,
    of_products: float, precision: str, *, turned: bool = False,
) -> None:  # fmt: skip
    """out = of_base base + of_products (pair + other), each a product of matrices [..., rows, inner] and
    [..., inner, columns], the second given as [..., columns, inner] if turned."""
    rows, columns, tile = *out.shape[-2:], MUON_TILES[out.element_size()]
    second = pair if other is None else other
    _MUON.step[(parts_of(rows, tile.block) * parts_of(columns, tile.block), out[..., 0, 0].numel())](
        *pair, *second, out if base is None else base, out, of_base, of_products,
        ROWS=rows, COLUMNS=columns, INNER=pair[0].shape[-1], TURNED=turned, TWO=other is not None,
        BASE=base is not None, BLOCK=tile.block, BLOCK_K=tile.block_k, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _start(flat: Tensor, group: Group, rule: Rule) -> tuple[Tensor, Tensor]:
    """X₀ and the norms [..., 1, 1] of a group's matrices, both in the iterates' dtype."""
    g = gather(flat, group).contiguous()
    dtype = muon_dtype(rule, g.dtype)
    x, norm = torch.empty(g.shape, dtype=dtype, device=g.device), g.new_empty(*g.shape[:-2], 1, 1, dtype=dtype)
    squares, sizes = _dots(g, g, dtype)
    _MUON.start[sizes.pop("grid")](g, squares, x, norm, EPS, ROUNDED=_kind(dtype), **sizes)
    return x, norm


def _start_gradient(grad: Tensor, kept: Iterates) -> Tensor:
    out = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    along, sizes = _dots(grad, kept.x[0], grad.dtype)
    _MUON.start_gradient[sizes.pop("grid")](grad, kept.x[0], kept.norm.contiguous(), along, out, EPS, **sizes)
    return out


def _dots(x: Tensor, y: Tensor, rounded: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Parts of the sums of x y over each matrix, x and y rounded; and the sizes that kernels over matrices take."""
    size, matrices = x.shape[-2] * x.shape[-1], x[..., 0, 0].numel()
    parts = parts_of(size, FLAT)
    out = torch.empty(matrices, parts, dtype=torch.float32, device=x.device)
    _MUON.dots[(parts, matrices)](x, y, out, SIZE=size, ROUNDED=_kind(rounded), BLOCK=FLAT)
    sizes = {"SIZE": size, "PARTS": parts, "PARTS_BLOCK": power(parts), "BLOCK": FLAT, "grid": (parts, matrices)}
    return out, sizes


def _kind(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def parts_of(size: int, part: int) -> int:
    """How many parts hold `size` elements."""
    return -(-size // part)


def power(size: int) -> int:
    """The power of two that is no smaller."""
    return 1 << (size - 1).bit_length()
