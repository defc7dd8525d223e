"""The backward pass of the unit: reads of all chunks at once, then the updates from the last to the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact import pieces as p
from fastweight.ops.lact.forward import Carry, Grid, Shape, Trail
from fastweight.ops.lact.muon import orthogonalise_gradient
from fastweight.state import zip_tensors

NO_UPDATE = (slice(0, 0), slice(0, 0))  # after the last chunk


class Gradients(NamedTuple):
    """Of the grid's tensors, in their dtypes, of the target norms [N, H, rows], and of the memory at the start."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    beta: Tensor | None
    norms: Tensor
    memory: Carry


def run(
    grid: Grid, trail: Trail, norms: Tensor, good: Tensor, y: Tensor, end: Carry, rule: Rule, active: list[int]
) -> Gradients:
    """good: [R], which updates happened. y: [R, H, C, D], gradient of the outputs; end: of the memory at the end."""
    shape = Shape.of(grid.q, trail.weights, active)
    q, read = read_gradient(grid.q, trail.weights, y, norms.dtype, shape)
    out = Gradients(
        q, torch.zeros_like(grid.k), torch.zeros_like(grid.v), torch.zeros_like(grid.lr),
        None if grid.beta is None else torch.zeros_like(grid.beta), torch.zeros_like(norms), end,
    )  # fmt: skip
    late = rule.update == "w1"  # directions of w1 alone do not depend on it: theirs wait until all are known
    asked = torch.zeros_like(trail.raw) if late else trail.raw
    carry = end.rows(slice(0, 0))
    for i, (here, there) in reversed(list(enumerate([*shape.updates(), NO_UPDATE]))):
        if i + 1 < len(active):
            carry, direction = _update_gradient(carry, here, there, trail, norms, grid, good, out, rule, shape)
            if late:
                asked[here] = direction
            else:
                found = directions_gradient(grid.rows(here), trail.weights[here], direction, good[here], shape)
                out.k[here], out.v[here], out.lr[here], weights = found
                carry = carry._replace(weights=carry.weights + weights)
        carry = _join(carry, end.rows(slice(carry.weights.shape[0], active[i])))
        carry.weights.add_(read[shape.chunk(i)])
    if late:
        out.k[:], out.v[:], out.lr[:, :, 1], inner = outer_gradient(grid, trail.weights, asked, good, shape)
        for i, rows in enumerate(active):
            shape.inner(carry.weights)[:rows] += inner[shape.chunk(i)]
    return out._replace(memory=carry)


def read_gradient(q: Tensor, weights: Tensor, y: Tensor, wide: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the flat weights that each chunk is read with, from that of y."""
    inner = shape.inner(weights)
    both, hidden = p.swiglu_gradient(q @ inner.mT, y @ shape.outer(weights), None)
    parts = p.wide_product(both.mT, q, wide), p.wide_product(y.mT, hidden, wide)
    return both @ inner, torch.cat([t.flatten(-2) for t in parts], -1)


def directions_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, lr and the flat weights of a chunk, from that of its directions for all three matrices."""
    low = direction.to(weights.dtype)
    inner = torch.cat([shape.inner(low), shape.inner(weights)], -2)  # [rows, H, 4F, D]
    outer = torch.cat([shape.outer(low), shape.outer(weights)], -1)  # [rows, H, D, 2F]
    if grid.lr.shape[-1] > 1:
        return _directions_gradient_by_channel(grid, inner, outer, good, shape, direction.dtype)
    asked, both = (grid.k @ inner.mT).chunk(2, -1)
    asked_hidden, g = (grid.v @ outer).chunk(2, -1)
    first, hidden, gx, gh, lr = p.swiglu_second(both, asked, g, asked_hidden, grid.lr, good)
    k = torch.cat([first, gx], -1) @ inner
    v = torch.cat([hidden, gh], -1) @ outer.mT
    return k, v, lr, _weights(gx, gh, grid, direction.dtype)


def _directions_gradient_by_channel(
    grid: Grid, inner: Tensor, outer: Tensor, good: Tensor, shape: Shape, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with rates [rows, H, 3, C, D]: those of w0 and w2 scale the channels of k, those of w1 hidden ones."""
    k, (r0, r1, r2) = grid.k, grid.lr.unbind(2)
    of0, of2, now = inner.split([shape.hidden, shape.hidden, 2 * shape.hidden], -2)
    asked = torch.cat([(r * k).to(k.dtype) @ w.mT for r, w in ((r0, of0), (r2, of2))], -1)
    asked_hidden, g = (grid.v @ outer).chunk(2, -1)
    rates = torch.stack([torch.ones_like(r1), r1, torch.ones_like(r1)], 2)
    first, hidden, gx, gh, lr = p.swiglu_second(k @ now.mT, asked, g, asked_hidden, rates, good)
    k0, k2 = (a @ w for a, w in zip(first.chunk(2, -1), (of0, of2), strict=True))
    lr = torch.stack([k * k0, lr[:, :, 1], k * k2], 2)
    v = torch.cat([hidden, gh], -1) @ outer.mT
    return (r0 * k0 + r2 * k2 + gx @ now).to(k.dtype), v, lr, _weights(gx, gh, grid, wide)


def outer_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, the rates of w1 and [w0; w2] of every chunk, from that of its direction for w1 alone."""
    inner, asked = shape.inner(weights), shape.outer(direction.to(weights.dtype))
    hidden, gx, lr = p.hidden_second(grid.k @ inner.mT, grid.v @ asked, grid.lr[:, :, 1], good)
    return gx @ inner, hidden @ asked.mT, lr, p.wide_product(gx.mT, grid.k, direction.dtype)


def _weights(gx: Tensor, gh: Tensor, grid: Grid, wide: torch.dtype) -> Tensor:
    """The gradient of the flat weights, from those of [a | u] and of g = v w1."""
    parts = p.wide_product(gx.mT, grid.k, wide), p.wide_product(grid.v.mT, gh, wide)
    return torch.cat([t.flatten(-2) for t in parts], -1)


def _update_gradient(
    carry: Carry, here: slice, there: slice, trail: Trail, norms: Tensor, grid: Grid, good: Tensor, out: Gradients,
    rule: Rule, shape: Shape,
) -> tuple[Carry, Tensor]:  # fmt: skip
    """The carried gradients before the update `here` → `there`, and that of its direction; fills norms and beta."""
    keep, rows = good[here], there.stop - there.start
    of_new = shape.learned(carry.weights, rule)
    raw, target = _rescale_gradient(trail.raw[there], trail.norm[there], norms[:rows], of_new, shape)
    out.norms[:rows] += p.only(keep, target)
    raw = p.only(keep, raw if carry.accumulator is None else raw + carry.accumulator)
    moved = raw
    if rule.muon != "none":
        iterates = trail.iterates[:, there]
        moved = orthogonalise_gradient(trail.moved[there], iterates, raw, rule, shape.dim, shape.hidden)
    momentum = carry.momentum
    if momentum is not None and grid.beta is not None and out.beta is not None:
        moved = p.only(keep, moved + momentum)
        out.beta[here] = (moved * trail.moved[here]).sum(-1)
        momentum = p.where(keep, moved * grid.beta[here][..., None], momentum)
    old = p.where(keep, torch.zeros_like(raw) if rule.prenorm else raw, of_new)
    accumulator = None if carry.accumulator is None else p.where(keep, raw, carry.accumulator)
    weights = torch.cat([carry.weights[..., : -old.shape[-1]], old], -1)
    return Carry(weights, momentum, accumulator), p.only(keep, moved)


def _rescale_gradient(raw: Tensor, norm: Tensor, target: Tensor, grad: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Gradients of the flat raw weights and of their target norms."""
    parts = shape.by_rows(raw)
    sizes = [x.shape[-2] for x in parts]
    inputs = zip(parts, norm.split(sizes, -1), target.split(sizes, -1), shape.by_rows(grad), strict=True)
    raws, targets = zip(*(p.rescale_gradient(*x) for x in inputs), strict=True)
    return torch.cat([t.flatten(-2) for t in raws], -1), torch.cat(targets, -1)


def _join(carry: Carry, more: Carry) -> Carry:
    """The carried rows and those that finished in this chunk."""
    return zip_tensors(lambda a, b: torch.cat([a, b]), carry, more)
