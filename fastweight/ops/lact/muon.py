"""Newton–Schulz on the flat fast weights of the unit, forward and backward.

A direction is flat, [rows, H, L]: the matrices (w0, w2, w1), or w1 alone, one behind the other. A group is a run of
them that is orthogonalised in one batch, brought to the same wide shape [rows, H, count, m, p] with m <= p.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact.grid import Shape
from fastweight.ops.lact.newton_schulz import COEFFICIENTS, EPS, start, start_gradient


class Group(NamedTuple):
    """offset: of the first matrix. shapes: (rows, columns) of each matrix, equal up to transposition."""

    offset: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def part(self) -> slice:
        rows, columns = self.shapes[0]
        return slice(self.offset, self.offset + len(self.shapes) * rows * columns)


def muon_dtype(rule: Rule, state: torch.dtype) -> torch.dtype:
    """Of the iterates."""
    return torch.bfloat16 if rule.muon_dtype == "bfloat16" else state


def groups(rule: Rule, dim: int, hidden: int) -> tuple[Group, ...]:
    """What is orthogonalised together. "joint" takes w0 and w2 as one [2F, D] matrix."""
    if rule.update == "w1":
        return (Group(0, ((dim, hidden),)),)
    if rule.muon == "separate":
        return (Group(0, ((hidden, dim), (hidden, dim), (dim, hidden))),)
    return Group(0, ((2 * hidden, dim),)), Group(2 * hidden * dim, ((dim, hidden),))


def gather(flat: Tensor, group: Group) -> Tensor:
    """[rows, H, L] → [rows, H, count, m, p]."""
    rows, columns = group.shapes[0]
    matrices = flat[..., group.part].unflatten(-1, (len(group.shapes), -1))
    if all(shape == (rows, columns) for shape in group.shapes) and rows <= columns:
        return matrices.unflatten(-1, (rows, columns))
    parts = [m.unflatten(-1, shape) for m, shape in zip(matrices.unbind(-2), group.shapes, strict=True)]
    return torch.stack([p if p.shape[-2] <= p.shape[-1] else p.transpose(-1, -2) for p in parts], -3)


def scatter(batches: list[Tensor], found: tuple[Group, ...]) -> Tensor:
    """The inverse of `gather` over all groups: [rows, H, L]."""
    shapes = found[0].shapes
    if len(found) == 1 and len(set(shapes)) == 1 and shapes[0][0] <= shapes[0][1]:
        return batches[0].flatten(-3)
    parts = []
    for batch, group in zip(batches, found, strict=True):
        for x, (rows, columns) in zip(batch.unbind(-3), group.shapes, strict=True):
            parts.append((x if rows <= columns else x.transpose(-1, -2)).flatten(-2))
    return torch.cat(parts, -1)


class Iterates(NamedTuple):
    """What one group's derivative needs: X₀ to X₄ as x, S = X Xᵀ and P = bS + cS² of each, ‖G‖ [..., 1, 1].

    x: five of [R, H, count, m, p]; s, p: five of [R, H, count, m, m].
    """

    x: list[Tensor]
    s: list[Tensor]
    p: list[Tensor]
    norm: Tensor

    def rows(self, part: slice) -> "Iterates":
        x, s, p = ([t[part] for t in group] for group in self[:3])
        return Iterates(x, s, p, self.norm[part])


def orthogonalise(flat: Tensor, rule: Rule, shape: Shape) -> Tensor:
    """The direction with singular values near one, [rows, H, L]."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    for group in found:
        x = start(gather(flat, group), rule.muon_dtype)[0]
        for coefficients in COEFFICIENTS:
            x = _iterate(x, coefficients)
        done.append(x.to(flat.dtype))
    return scatter(done, found)


def iterates(flat: Tensor, rule: Rule, shape: Shape) -> list[Iterates]:
    """The iterations that `orthogonalise` made of each row's direction, group by group, all rows at once."""
    made = []
    for group in groups(rule, shape.dim, shape.hidden):
        x, _, norm = start(gather(flat, group), rule.muon_dtype)
        all_x, all_s, all_p = [x], [], []
        for number, (_, b, c) in enumerate(COEFFICIENTS):
            s = all_x[-1] @ all_x[-1].mT
            all_s.append(s)
            all_p.append(_polynomial(s, b, c))
            if number < len(COEFFICIENTS) - 1:
                all_x.append(_iterate(all_x[-1], COEFFICIENTS[number]))
        made.append(Iterates(all_x, all_s, all_p, norm))
    return made


def orthogonalise_gradient(made: list[Iterates], grad: Tensor, rule: Rule, shape: Shape) -> Tensor:
    """The gradient of the direction from that of its orthogonalised form [rows, H, L]; made: of these rows."""
    found, done = groups(rule, shape.dim, shape.hidden), []
    for group, kept in zip(found, made, strict=True):
        g = gather(grad, group).to(kept.x[0].dtype)
        for i in reversed(range(len(COEFFICIENTS))):
            g = _iterate_gradient(kept.x[i], kept.s[i], kept.p[i], COEFFICIENTS[i], g)
        scale = (kept.norm + EPS).to(grad.dtype)
        done.append(start_gradient(kept.x[0].to(grad.dtype) * scale, kept.norm, g.to(grad.dtype)))
    return scatter(done, found)


def _iterate(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """One step X → aX + (bS + cS²)X, in three products."""
    a, b, c = coefficients
    flat = x.flatten(0, -3)
    s = flat @ flat.mT
    if x.dtype == torch.bfloat16:  # every step rounded, as the published code does
        return (a * flat + (b * s + (c * s) @ s) @ flat).view_as(x)
    return torch.baddbmm(flat, torch.baddbmm(s, s, s, beta=b, alpha=c), flat, beta=a).view_as(x)


def _polynomial(s: Tensor, b: float, c: float) -> Tensor:
    """P = bS + cS²."""
    flat = s.flatten(0, -3)
    if s.dtype == torch.bfloat16:
        return (b * flat + (c * flat) @ flat).view_as(s)
    return torch.baddbmm(flat, flat, flat, beta=b, alpha=c).view_as(s)


def _iterate_gradient(
    x: Tensor, s: Tensor, p: Tensor, coefficients: tuple[float, float, float], grad: Tensor
) -> Tensor:
    """The gradient of X from that of its next iterate, in four products.

    S is symmetric, so only the symmetric part of its gradient counts: with H = grad Xᵀ + X gradᵀ it is
    Y = bH + c(HS + SH), and the gradient of X is a grad + P grad + Y X.
    """
    a, b, c = coefficients
    x, s, p, g = (t.flatten(0, -3) for t in (x, s, p, grad))
    h = g @ x.mT
    h = h + h.mT
    hs = h @ s
    y = b * h + c * (hs + hs.mT)
    return torch.baddbmm(torch.baddbmm(g, p, g, beta=a), y, x).view_as(grad)
