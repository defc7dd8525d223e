"""The arithmetic of one LaCT call and its derivatives, in plain torch: what the unit's loops are made of.

Z stands for any leading dimensions (sequences, heads). Products run in the dtype of the tokens ("compute dtype"),
everything that is kept between chunks in the dtype of the state ("wide": float32, or float64 in tests).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.lact import RENORM_EPS
from fastweight.ops.lact.grid import Carry, Shape
from fastweight.ops.lact.muon import Iterates, iterates, orthogonalise, orthogonalise_gradient


class Pieces(NamedTuple):
    """One implementation of each piece; the functions below say what they do."""

    swiglu: Callable[..., Tensor]
    swiglu_gradient: Callable[..., tuple[Tensor, Tensor]]
    swiglu_second: Callable[..., tuple[Tensor, Tensor]]
    hidden_second: Callable[..., tuple[Tensor, Tensor, Tensor]]
    move: Callable[..., Tensor]
    move_rows: Callable[..., Tensor]
    add_rows: Callable[..., None]
    settle: Callable[..., tuple[Tensor, Tensor]]
    unsettle: Callable[..., tuple[Tensor, Tensor | None]]
    unmove: Callable[..., tuple[Tensor | None, Tensor | None]]
    orthogonalise: Callable[..., Tensor]
    iterates: Callable[..., list[Iterates]]
    orthogonalise_gradient: Callable[..., Tensor]
    swap: Callable[..., Tensor]
    keep_finite: Callable[..., None]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in b's dtype. Where that is wider than a's, b is multiplied in two parts that a's dtype can hold."""
    if a.dtype == b.dtype:
        return a @ b
    high, low = wide_product(a, torch.cat(_split(b, a.dtype), -1), b.dtype).chunk(2, -1)
    return high + low


def token_sum(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Σ over tokens of a bᵀ, kept wide: [Z, C, m], [Z, C, n] → [Z, m, n]. A wider one is multiplied in two parts."""
    if a.dtype == b.dtype:
        return wide_product(a.mT, b, wide)
    if a.dtype == wide:
        high, low = wide_product(torch.cat(_split(a, b.dtype), -1).mT, b, wide).chunk(2, -2)
    else:
        high, low = wide_product(a.mT, torch.cat(_split(b, a.dtype), -1), wide).chunk(2, -1)
    return high + low


def wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b, operands of one dtype as they are, summed and returned in the dtype `wide`."""
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=wide).unflatten(0, a.shape[:-2])
    return a.to(wide) @ b.to(wide)


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in a's dtype, which may be wider than b's: then a is multiplied in two parts that b's dtype can hold."""
    if a.dtype == b.dtype:
        return a @ b
    high, low = (wide_product(part, b, a.dtype) for part in _split(a, b.dtype))
    return high + low


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, matrices in the last two dimensions of each; out may be wider than they are."""
    matrices = a.flatten(0, -3), b.flatten(0, -3)
    if out.dtype == a.dtype:
        torch.bmm(*matrices, out=out.flatten(0, -3))
    elif a.is_cuda:
        torch.bmm(*matrices, out_dtype=out.dtype, out=out.flatten(0, -3))
    else:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, as in `multiply`."""
    matrices, flat = (a.flatten(0, -3), b.flatten(0, -3)), total.flatten(0, -3)
    if total.dtype == a.dtype:
        torch.baddbmm(flat, *matrices, out=flat)
    elif a.is_cuda:
        torch.baddbmm(flat, *matrices, out_dtype=total.dtype, out=flat)
    else:
        total.add_(a.to(total.dtype) @ b.to(total.dtype))


def _split(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t = high + low, each of `dtype`, up to the square of its rounding error."""
    high = t.to(dtype)
    return high, (t - high).to(dtype)


def swiglu(both: Tensor, lr: Tensor | None = None) -> Tensor:
    """silu(a) u from [a | u]: [Z, C, 2F] → [Z, C, F], times the rates [Z, C, 1 or F] of w1 if there are any.

    lr: the second of three rates in [Z, 3, C, 1 or F].
    """
    a, u = _up(both).chunk(2, -1)
    hidden = F.silu(a).mul_(u)
    return (hidden if lr is None else hidden * lr).to(both.dtype)


def swiglu_gradient(both: Tensor, g: Tensor, lr: Tensor | None) -> tuple[Tensor, Tensor]:
    """([∂a | ∂u], hidden) for hidden = silu(a) u with gradient g, scaled by the rates. May write to both and g.

    both: [a | u], [Z, C, 2F]. g: [Z, C, F]. lr: [Z, 3, C, 1], the rates of (∂a, hidden, ∂u), or None for one.
    """
    out, wide = _up(both), _up(g)
    a, u = out.chunk(2, -1)
    s = a.sigmoid()
    silu = a * s
    hidden = silu * u
    slope = torch.addcmul(s, silu, 1 - s)
    torch.mul(u, slope.mul_(wide), out=a)
    torch.mul(wide, silu, out=u)
    if lr is not None:
        for t, rate in zip((a, hidden, u), lr.unbind(-3), strict=True):
            t.mul_(rate)
    return out.to(both.dtype), hidden.to(g.dtype)


def swiglu_second(left: Tensor, right: Tensor, lr: Tensor, good: Tensor, of_lr: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of `swiglu_gradient`, zero in rows that are not `good`. May write to left and right.

    left: [P0 | P2 | a | u], [Z, C, 4F] and right: [Q | g], [Z, C, 2F], where P0, P2, Q are the gradients of its results
    (∂a, ∂u, hidden) *before* rates. lr: as above, or [Z, 3, C, F] with rates per channel. good: bool, of Z's first
    dimension. Returns ([lr0 ∂a | lr2 ∂u | gradient of a | of u], [lr1 hidden | gradient of g]); fills of_lr, the
    gradient of lr.
    """
    p0, p2, x, y = _up(left).chunk(4, -1)
    q, h = _up(right).chunk(2, -1)
    r0, r1, r2 = lr.unbind(-3)
    s = x.sigmoid()
    silu = x * s
    slope = s + silu * (1 - s)
    curve = (2 + x - 2 * silu).mul_(s).mul_(1 - s)
    hy, qy, p0h, p2h = h * y, q * y, p0 * h, p2 * h
    rates = torch.stack([p0h * y * slope, qy * silu, p2h * silu], -3)
    rates = rates if lr.shape[-1] > 1 else rates.sum(-1, keepdim=True)
    p0h, p2h, qy = p0h.mul_(r0), p2h.mul_(r2), qy.mul_(r1)
    gx = (p2h + qy).mul_(slope).addcmul_(p0h * y, curve)
    gy = (p0h * slope).addcmul_(r1 * q, silu)
    gh = (p0 * r0 * y * slope).addcmul_(p2 * r2, silu)
    left = torch.cat([(hy * slope).mul_(r0), (h * silu).mul_(r2), gx, gy], -1).to(left.dtype)
    right = torch.cat([(silu * y).mul_(r1), gh], -1).to(right.dtype)
    of_lr.copy_(only(good, rates))
    return only(good, left), only(good, right)


def hidden_second(both: Tensor, asked: Tensor, lr: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where only lr hidden was a result: (lr hidden, gradient of [a | u], gradient of lr [Z, C, 1 or F]).

    asked: [Z, C, F], the gradient of that result before the rate. lr: [Z, C, 1 or F]. May write to both and asked.
    """
    out, q = _up(both), _up(asked)
    x, y = out.chunk(2, -1)
    s = x.sigmoid()
    silu = x * s
    hidden, rated = silu * y, q * lr
    rates = q * hidden
    rates = rates if lr.shape[-1] > 1 else rates.sum(-1, keepdim=True)
    slope = torch.addcmul(s, silu, 1 - s)
    torch.mul(y, slope.mul_(rated), out=x)
    torch.mul(rated, silu, out=y)
    return only(good, hidden.mul_(lr).to(asked.dtype)), only(good, out.to(both.dtype)), only(good, rates)


def move(
    direction: tuple[Tensor | None, Tensor], momentum: Tensor | None, beta: Tensor | None, moved: Tensor
) -> Tensor:
    """Fill moved [rows, H, L] = direction + beta momentum, flat. Returns its squares' sum [rows]."""
    parts = [t.flatten(-2) for t in direction if t is not None]
    torch.cat(parts, -1, out=moved) if moved.is_contiguous() else moved.copy_(torch.cat(parts, -1))
    if momentum is not None and beta is not None:
        moved.addcmul_(beta[..., None], momentum)
    return moved.square().sum((1, 2))


def move_rows(
    direction: tuple[Tensor | None, Tensor], momentum: Tensor | None, beta: Tensor | None, moved: Tensor, base: Tensor,
    raw: Tensor, norm: Tensor, shape: Shape,
) -> Tensor:  # fmt: skip
    """`move`, then `add_rows` of what was moved."""
    energy = move(direction, momentum, beta, moved)
    add_rows(moved, base, raw, norm, shape)
    return energy


def add_rows(stepped: Tensor, base: Tensor, raw: Tensor, norm: Tensor, shape: Shape) -> None:
    """Fill raw = stepped + base [rows, H, L] and the norms of its rows."""
    torch.add(stepped, base, out=raw)
    torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in shape.by_rows(raw)], -1, out=norm)


def settle(
    carry: Carry, moved: Tensor, energy: Tensor, raw: Tensor, norm: Tensor, target: Tensor, due: Tensor, low: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weights [rows, H, L] after the update, whether it happened [rows]); fills low with them, rounded.

    It happens where it is due and all sums are finite; elsewhere weights, momentum and accumulator stay as in carry.
    """
    good = (energy + norm.sum((1, 2))).isfinite() & due
    scale = target / (norm + RENORM_EPS)
    parts = shape.by_rows(raw)
    scales = scale.split([part.shape[-2] for part in parts], -1)
    scaled = torch.cat([(t * s[..., None]).flatten(-2) for t, s in zip(parts, scales, strict=True)], -1)
    weights = where(good, scaled, carry.weights)
    for new, old in ((moved, carry.momentum), (raw, carry.accumulator)):
        if old is not None:
            new.copy_(where(good, new, old))
    low.copy_(weights)
    return weights, good


def unsettle(
    weights: Tensor, raw: Tensor, norm: Tensor, target: Tensor, accumulator: Tensor | None, good: Tensor, now: Tensor,
    of_target: Tensor, shape: Shape,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """From the gradients of the weights and the accumulator after an update: (that of the direction that was added,
    zero where the update did not happen; that of the accumulator before, or None). [rows, H, L] each.

    Adds the gradient of the weights before to now [rows, H, L], and that of the target norms to of_target.
    """
    sizes = [part.shape[-2] for part in shape.by_rows(raw)]
    rows = (t.split(sizes, -1) for t in (norm, target))
    inputs = zip(shape.by_rows(raw), *rows, shape.by_rows(weights), strict=True)
    raws, targets = zip(*(_rescale_gradient(*x) for x in inputs), strict=True)
    gradient = torch.cat([t.flatten(-2) for t in raws], -1)
    gradient = gradient if accumulator is None else gradient + accumulator
    of_target += only(good, torch.cat(targets, -1))
    stepped = only(good, gradient)
    if accumulator is None:
        now += where(good, gradient, weights)
        return stepped, None
    now += only(~good, weights)
    return stepped, where(good, gradient, accumulator)


def unmove(
    moved: Tensor, momentum: Tensor | None, beta: Tensor | None, before: Tensor, good: Tensor, direction: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the momentum before and of beta, from those of moved and of the momentum after.

    before: [rows, H, L], the momentum before. Fills direction, rounded, with the gradient of the direction.
    """
    if momentum is None or beta is None:
        direction.copy_(only(good, moved))
        return None, None
    total = only(good, moved + momentum)
    direction.copy_(total)
    return where(good, total * beta[..., None], momentum), (total * before).sum(-1)


def _rescale_gradient(raw: Tensor, norm: Tensor, target: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of raw and target for y = raw · target / (norm + eps), from the gradient of y."""
    along = (grad * raw).sum(-1)
    inverse = 1 / (norm + RENORM_EPS)
    # A row of zeros has no direction to lose: its norm is taken as constant, as torch does.
    radial = torch.where(norm > 0, along * target * inverse.square() / norm, 0)
    return grad * (target * inverse)[..., None] - raw * radial[..., None], along * inverse


def swap(t: Tensor, dtype: torch.dtype, good: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """[R, a, b, D] → [R, b, a, D] in `dtype`, zero in rows that are not good [R]. Always a copy: no result of an
    operator may share memory with its inputs."""
    if out is None:
        out = t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3], dtype=dtype)
    if good is None:
        return out.copy_(t.transpose(1, 2))
    return torch.where(good.view(-1, 1, 1, 1), t.to(dtype).transpose(1, 2), out.new_zeros(()), out=out)


def keep_finite(t: Tensor, good: Tensor) -> None:
    """Clear good [R], bool, where t [R, a, b, D] holds anything that is not finite."""
    good &= torch.stack(t.flatten(1).aminmax(dim=1)).isfinite().all(0)


def only(good: Tensor, t: Tensor) -> Tensor:
    """t [rows, …], zero in rows that are not good [rows]."""
    return t.masked_fill(~good.view(-1, *[1] * (t.dim() - 1)), 0)


def where(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new in rows that are good [rows], old elsewhere."""
    return torch.where(good.view(-1, *[1] * (new.dim() - 1)), new, old)


def _up(t: Tensor) -> Tensor:
    """At least float32: element-wise arithmetic is not rounded between its steps."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


TORCH = Pieces(
    swiglu, swiglu_gradient, swiglu_second, hidden_second, move, move_rows, add_rows, settle, unsettle, unmove,
    orthogonalise, iterates, orthogonalise_gradient, swap, keep_finite,
)  # fmt: skip
