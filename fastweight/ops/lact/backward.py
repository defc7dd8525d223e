"""The backward pass of the unit: reads of all chunks at once, then the updates from the last to the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact.forward import needs_exact
from fastweight.ops.lact.grid import Carry, Grid, Memory, Shape, Trail
from fastweight.ops.lact.pieces import TORCH, Pieces, only, token_sum, where, wide_product
from fastweight.state import zip_tensors

NO_UPDATE = (slice(0, 0), slice(0, 0))  # after the last chunk


class Gradients(NamedTuple):
    """Of the grid's tensors, in their dtypes, and of the memory at the start."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    beta: Tensor | None
    memory: Memory


def run(
    grid: Grid, trail: Trail, norms: Tensor, good: Tensor, y: Tensor, end: Memory, rule: Rule, active: list[int],
    p: Pieces,
) -> Gradients:  # fmt: skip
    """good: [R], which updates happened. y: [R, H, C, D], gradient of the outputs; end: of the memory at the end."""
    shape = Shape.of(grid, trail.weights, active)
    q, read = read_gradient(grid.q, trail.weights, y, norms.dtype, shape, p)
    out = Gradients(
        q, torch.zeros_like(grid.k), torch.zeros_like(grid.v), torch.zeros_like(grid.lr),
        None if grid.beta is None else torch.zeros_like(grid.beta), end._replace(norms=torch.zeros_like(norms)),
    )  # fmt: skip
    late = rule.update == "w1"  # directions of w1 alone do not depend on it: theirs wait until all are known
    asked = torch.zeros_like(trail.raw) if late else trail.raw[:0]
    final = Carry(shape.learned(end.weights, rule), end.momentum, end.accumulator)
    carry = final.rows(slice(0, 0))
    for i, (here, there) in reversed(list(enumerate([*shape.updates(), NO_UPDATE]))):
        now = shape.learned(read[shape.chunk(i)], rule)  # where the gradient of this chunk's weights adds up
        going = len(carry.weights)
        if going:
            carry, direction = _update_gradient(carry, here, there, trail, norms, grid, good, out, rule, shape, p)
            now[:going] += carry.weights
            if late:
                asked[here] = direction
            else:
                part = grid.rows(here), trail.weights[here], direction, good[here], rule, shape, p
                out.k[here], out.v[here], out.lr[here] = directions_gradient(*part, now[:going])
        more = final.rows(slice(going, active[i]))
        now[going:] += more.weights
        carry = zip_tensors(
            lambda a, b: torch.cat([a, b]) if len(b) else a, carry._replace(weights=more.weights[:0]), more
        )
        carry = carry._replace(weights=now)
    weights = carry.weights
    if late:
        inner = read[..., : -carry.weights.shape[-1]]
        out.k[:], out.v[:], out.lr[:, :, 1] = outer_gradient(grid, trail.weights, asked, good, shape, p, inner)
        fixed = end.weights[..., : inner.shape[-1]].clone()
        for i, rows in enumerate(active):
            fixed[:rows] += inner[shape.chunk(i)]
        weights = torch.cat([fixed, weights], -1)
    return out._replace(memory=Memory(weights, out.memory.norms, carry.momentum, carry.accumulator))


def read_gradient(
    q: Tensor, weights: Tensor, y: Tensor, wide: torch.dtype, shape: Shape, p: Pieces
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the flat weights that each chunk is read with, from that of y."""
    inner = shape.inner(weights)
    both, hidden = p.swiglu_gradient(q @ inner.mT, y @ shape.outer(weights), None)
    parts = token_sum(both, q, wide), token_sum(y, hidden, wide)
    return both @ inner, torch.cat([t.flatten(-2) for t in parts], -1)


def directions_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, rule: Rule, shape: Shape, p: Pieces, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and lr of a chunk, from that of its directions; adds that of its flat weights to total."""
    low = direction.to(weights.dtype)
    inner = torch.cat([shape.inner(low), shape.inner(weights)], -2)  # [rows, H, 4F, D]
    outer = torch.cat([shape.outer(low), shape.outer(weights)], -1)  # [rows, H, D, 2F]
    if grid.lr.shape[-1] == 1:
        # Newton–Schulz in float32 hands on what other roundings leave: those of these products can be avoided.
        wide = direction.dtype if needs_exact(rule, shape) else low.dtype
        both = wide_product(grid.k, inner.mT, wide), wide_product(grid.v, outer, wide)
        left, right, lr = p.swiglu_second(*both, grid.lr, good)
        left, right = left.to(low.dtype), right.to(low.dtype)
        k = left @ inner
    else:
        k, left, right, lr = _by_channel(grid, inner, outer, good, shape, p)
    shape.inner(total).add_(token_sum(left[..., 2 * shape.hidden :], grid.k, direction.dtype))
    shape.outer(total).add_(token_sum(grid.v, right[..., shape.hidden :], direction.dtype))
    return k, right @ outer.mT, lr


def _by_channel(
    grid: Grid, inner: Tensor, outer: Tensor, good: Tensor, shape: Shape, p: Pieces
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With rates [rows, H, 3, C, D]: those of w0 and w2 scale the channels of k, those of w1 hidden ones."""
    k, (r0, r1, r2) = grid.k, grid.lr.unbind(2)
    of0, of2, now = inner.split([shape.hidden, shape.hidden, 2 * shape.hidden], -2)
    asked = [(r * k).to(k.dtype) @ w.mT for r, w in ((r0, of0), (r2, of2))]
    rates = torch.stack([torch.ones_like(r1), r1, torch.ones_like(r1)], 2)
    left, right, lr = TORCH.swiglu_second(torch.cat([*asked, k @ now.mT], -1), grid.v @ outer, rates, good)
    first, third, rest = left.split([shape.hidden, shape.hidden, 2 * shape.hidden], -1)
    k0, k2 = first @ of0, third @ of2
    lr = torch.stack([k * k0, lr[:, :, 1], k * k2], 2)
    return (r0 * k0 + r2 * k2 + rest @ now).to(k.dtype), left, right, lr


def outer_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, shape: Shape, p: Pieces, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and the rates of w1 of every chunk, from that of its direction for w1 alone; adds to total."""
    inner, asked = shape.inner(weights), shape.outer(direction.to(weights.dtype))
    hidden, gx, lr = p.hidden_second(grid.k @ inner.mT, grid.v @ asked, grid.lr[:, :, 1], good)
    total.unflatten(-1, inner.shape[-2:]).add_(token_sum(gx, grid.k, direction.dtype))
    return gx @ inner, hidden @ asked.mT, lr


def _update_gradient(
    carry: Carry, here: slice, there: slice, trail: Trail, norms: Tensor, grid: Grid, good: Tensor, out: Gradients,
    rule: Rule, shape: Shape, p: Pieces,
) -> tuple[Carry, Tensor]:  # fmt: skip
    """The carried gradients before the update `here` → `there`, and that of its direction; fills norms and beta."""
    keep, rows = good[here], there.stop - there.start
    kept = trail.raw[there], trail.norm[there]
    raw, target = p.unsettle(carry.weights, *kept, norms[:rows], carry.accumulator, keep, shape)
    out.memory.norms[:rows] += target
    moved = raw
    if rule.muon != "none":
        moved = p.orthogonalise_gradient(trail.moved[there], trail.iterates[:, there], raw, rule, shape)
    beta = None if grid.beta is None else grid.beta[here]
    before = trail.moved[here] if trail.moved.numel() else raw
    direction, momentum, of_beta = p.unmove(moved, carry.momentum, beta, before, keep)
    if out.beta is not None and of_beta is not None:
        out.beta[here] = of_beta
    if carry.accumulator is None:
        return Carry(where(keep, raw, carry.weights), momentum, None), direction
    return Carry(only(~keep, carry.weights), momentum, where(keep, raw, carry.accumulator)), direction
