"""The arithmetic of one LaCT call and its derivatives, in plain torch: what the unit's loops are made of.

Z stands for any leading dimensions (sequences, heads). Products run in the dtype of the tokens ("compute dtype"),
everything that is kept between chunks in the dtype of the state ("wide": float32, or float64 in tests).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.lact import RENORM_EPS


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with operands as they are, summed and returned in the state's dtype. a: [Z, m, k], b: [Z, k, n]."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        both = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=dtype)
        return both.unflatten(0, a.shape[:-2])
    return a.to(dtype) @ b.to(dtype)


def swiglu(both: Tensor) -> Tensor:
    """silu(a) u from [a | u]: [Z, C, 2F] → [Z, C, F]."""
    a, u = _up(both).chunk(2, -1)
    return (F.silu(a) * u).to(both.dtype)


def swiglu_gradient(both: Tensor, g: Tensor, lr: Tensor | None) -> tuple[Tensor, Tensor]:
    """([∂a | ∂u], hidden) for hidden = silu(a) u with gradient g, scaled by the rates.

    both: [a | u], [Z, C, 2F]. g: [Z, C, F]. lr: [Z, 3, C, 1], the rates of (∂a, hidden, ∂u), or None for one.
    """
    a, u = _up(both).chunk(2, -1)
    wide = _up(g)
    s = a.sigmoid()
    silu = a * s
    one = lr is None
    r0, r1, r2 = (1, 1, 1) if one else lr.unbind(-3)
    ga, gu = r0 * (wide * u * (s + silu * (1 - s))), r2 * (wide * silu)
    return torch.cat([ga, gu], -1).to(both.dtype), (r1 * (silu * u)).to(g.dtype)


def swiglu_second(
    both: Tensor, grad_both: Tensor, g: Tensor, grad_hidden: Tensor, lr: Tensor, good: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivative of `swiglu_gradient`, zero in rows that are not `good`.

    grad_both: [P0 | P2], [Z, C, 2F] and grad_hidden: [Z, C, F], gradients of its two results *before* rates. lr: as
    above, or [Z, 3, C, F] with rates per channel. good: bool, of Z's first dimension.
    Returns ([lr0 ∂a | lr2 ∂u], lr1 hidden) once more, the gradients of [a | u] and of g, and of the rates, lr's shape.
    """
    x, y = _up(both).chunk(2, -1)
    p0, p2 = _up(grad_both).chunk(2, -1)
    h, q = _up(g), _up(grad_hidden)
    r0, r1, r2 = lr.unbind(-3)
    s = x.sigmoid()
    silu = x * s
    slope = s + silu * (1 - s)
    curve = s * (1 - s) * (2 + x - 2 * silu)
    first = torch.cat([r0 * (h * y * slope), r2 * (h * silu)], -1)
    hidden = r1 * (silu * y)
    gx = (r2 * p2 * h + r1 * q * y) * slope + r0 * p0 * h * y * curve
    gy = r0 * p0 * h * slope + r1 * q * silu
    gh = r0 * p0 * y * slope + r2 * p2 * silu
    rates = torch.stack([p0 * h * y * slope, q * y * silu, p2 * h * silu], -3)
    rates = rates if lr.shape[-1] > 1 else rates.sum(-1, keepdim=True)
    low = [only(good, t).to(both.dtype) for t in (first, hidden, torch.cat([gx, gy], -1), gh)]
    return low[0], low[1], low[2], low[3], only(good, rates)


def hidden_second(both: Tensor, grad_hidden: Tensor, lr: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where only lr hidden was a result: (lr hidden, gradient of [a | u], gradient of lr [Z, C, 1 or F])."""
    x, y = _up(both).chunk(2, -1)
    q = _up(grad_hidden)
    s = x.sigmoid()
    silu = x * s
    gx, gy = lr * q * y * (s + silu * (1 - s)), lr * q * silu
    rates = q * y * silu
    rates = rates if lr.shape[-1] > 1 else rates.sum(-1, keepdim=True)
    hidden, inner = (only(good, t).to(both.dtype) for t in (lr * silu * y, torch.cat([gx, gy], -1)))
    return hidden, inner, only(good, rates)


def only(good: Tensor, t: Tensor) -> Tensor:
    """t [rows, …], zero in rows that are not good [rows]."""
    return t.masked_fill(~good.view(-1, *[1] * (t.dim() - 1)), 0)


def rescale(raw: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(raw with rows of norm `target`, norms of its rows). raw: [Z, rows, columns], target: [Z, rows]."""
    norm = torch.linalg.vector_norm(raw, dim=-1)
    return raw * (target / (norm + RENORM_EPS))[..., None], norm


def rescale_gradient(raw: Tensor, norm: Tensor, target: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of raw and target for y = raw · target / (norm + eps), from the gradient of y."""
    along = (grad * raw).sum(-1)
    inverse = 1 / (norm + RENORM_EPS)
    # A row of zeros has no direction to lose: its norm is taken as constant, as torch does.
    radial = torch.where(norm > 0, along * target * inverse.square() / norm, 0)
    return grad * (target * inverse)[..., None] - raw * radial[..., None], along * inverse


def where(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """new in rows that are good [rows], old elsewhere."""
    return torch.where(good.view(-1, *[1] * (new.dim() - 1)), new, old)


def _up(t: Tensor) -> Tensor:
    """At least float32: element-wise arithmetic is not rounded between its steps."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
