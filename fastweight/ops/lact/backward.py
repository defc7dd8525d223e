"""The backward pass of the unit: reads of all chunks at once, then the updates from the last to the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact.forward import needs_exact
from fastweight.ops.lact.grid import Carry, Grid, Memory, Shape, Trail
from fastweight.ops.lact.muon import Iterates
from fastweight.ops.lact.pieces import TORCH, Pieces, add_product, multiply, split_product, token_sum
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
    late = rule.update == "w1"  # directions of w1 alone do not depend on it: theirs wait until all are known
    out = _empty_gradients(q, grid, end, norms, shape, late=late)
    asked = torch.zeros_like(trail.raw) if late else trail.raw[:0]
    made = [] if rule.muon == "none" else p.iterates(trail.moved[active[0] :], rule, shape)
    final = Carry(shape.learned(end.weights, rule), end.momentum, end.accumulator)
    carry = final.rows(slice(0, 0))
    for i, (here, there) in reversed(list(enumerate([*shape.updates(), NO_UPDATE]))):
        now = shape.learned(read[shape.chunk(i)], rule)  # where the gradient of this chunk's weights adds up
        going = len(carry.weights)
        if going:
            part = [group.rows(slice(there.start - active[0], there.stop - active[0])) for group in made]
            carry, direction = _update_gradient(
                carry, here, there, trail, part, norms, grid, good, out, now[:going], rule, shape, p
            )
            if late:
                asked[here] = direction
            else:
                directions_gradient(
                    grid.rows(here), trail.weights[here], direction, good[here], rule, shape, p, now[:going],
                    (out.k[here], out.v[here], out.lr[here]),
                )  # fmt: skip
        if going < active[i]:
            more = final.rows(slice(going, active[i]))
            now[going:] += more.weights
            carry = zip_tensors(lambda a, b: torch.cat([a, b]), carry._replace(weights=more.weights[:0]), more)
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
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, rule: Rule, shape: Shape, p: Pieces, total: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `into`, the gradients of k, v and lr of a chunk, from that of its directions; add that of its flat weights
    to total."""
    of_k, of_v, of_lr = into
    low, hidden = direction.to(weights.dtype), shape.hidden
    inner, outer = (shape.inner(low), shape.inner(weights)), (shape.outer(low), shape.outer(weights))
    if grid.lr.shape[-1] > 1:
        left, right = _by_channel(grid, inner, outer, good, shape, of_k, of_lr)
    else:
        # Newton–Schulz in float32 hands on what other roundings leave: those of these products can be avoided.
        wide = direction.dtype if needs_exact(rule, shape) else low.dtype
        left = low.new_empty(*grid.k.shape[:-1], 4 * hidden, dtype=wide)
        right = low.new_empty(*grid.k.shape[:-1], 2 * hidden, dtype=wide)
        for half in range(2):
            multiply(grid.k, inner[half].mT, left[..., 2 * hidden * half : 2 * hidden * (half + 1)])
            multiply(grid.v, outer[half], right[..., hidden * half : hidden * (half + 1)])
        left, right = (t.to(low.dtype) for t in p.swiglu_second(left, right, grid.lr, good, of_lr))
        multiply(left[..., : 2 * hidden], inner[0], of_k)
        add_product(of_k, left[..., 2 * hidden :], inner[1])
    multiply(right[..., :hidden], outer[0].mT, of_v)
    add_product(of_v, right[..., hidden:], outer[1].mT)
    add_product(shape.inner(total), left[..., 2 * hidden :].mT, grid.k)
    add_product(shape.outer(total), grid.v.mT, right[..., hidden:])


def _by_channel(
    grid: Grid, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], good: Tensor, shape: Shape, of_k: Tensor,
    of_lr: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """With rates [rows, H, 3, C, D]: those of w0 and w2 scale the channels of k, those of w1 hidden ones."""
    k, r0, r1, r2 = grid.k, grid.lr[:, :, 0], grid.lr[:, :, 1], grid.lr[:, :, 2]
    of0, of2 = inner[0].split(shape.hidden, -2)
    asked = [split_product(r * k, w.mT) for r, w in ((r0, of0), (r2, of2))]
    rates = torch.stack([torch.ones_like(r1), r1, torch.ones_like(r1)], 2)
    now = split_product(k.to(r0.dtype), inner[1].mT)
    values = torch.cat([split_product(grid.v.to(r0.dtype), w) for w in outer], -1)
    left, right = TORCH.swiglu_second(torch.cat([*asked, now], -1), values, rates, good, of_lr)
    first, third, rest = left.split([shape.hidden, shape.hidden, 2 * shape.hidden], -1)
    k0, k2, own = split_product(first, of0), split_product(third, of2), split_product(rest, inner[1])
    of_lr[:, :, 0] = k * k0
    of_lr[:, :, 2] = k * k2
    of_k.copy_(r0 * k0 + r2 * k2 + own)
    return left.to(k.dtype), right.to(k.dtype)


def outer_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, shape: Shape, p: Pieces, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and the rates of w1 of every chunk, from that of its direction for w1 alone; adds to total."""
    inner, asked = shape.inner(weights), shape.outer(direction.to(weights.dtype))
    hidden, gx, lr = p.hidden_second(grid.k @ inner.mT, grid.v @ asked, grid.lr[:, :, 1], good)
    total.unflatten(-1, inner.shape[-2:]).add_(token_sum(gx, grid.k, direction.dtype))
    return gx @ inner, hidden @ asked.mT, lr


def _empty_gradients(q: Tensor, grid: Grid, end: Memory, norms: Tensor, shape: Shape, *, late: bool) -> Gradients:
    """To be filled: of every chunk but the last ones, which nothing is learned from; of all chunks at once if late."""
    k, v = torch.empty_like(grid.k), torch.empty_like(grid.v)
    lr = torch.zeros_like(grid.lr) if late else torch.empty_like(grid.lr)
    beta = None if grid.beta is None else torch.zeros_like(grid.beta)
    for learned, rows in zip([*shape.active[1:], 0], range(len(shape.active)), strict=True):
        for t in (k, v, lr):
            t[shape.offset[rows] + learned : shape.offset[rows + 1]] = 0
    return Gradients(q, k, v, lr, beta, end._replace(norms=torch.zeros_like(norms)))


def _update_gradient(
    carry: Carry, here: slice, there: slice, trail: Trail, made: list[Iterates], norms: Tensor, grid: Grid,
    good: Tensor, out: Gradients, now: Tensor, rule: Rule, shape: Shape, p: Pieces,
) -> tuple[Carry, Tensor]:  # fmt: skip
    """The carried gradients before the update `here` → `there`, and that of its direction; fills norms and beta, adds
    that of the weights to now."""
    keep, rows = good[here], there.stop - there.start
    kept = trail.raw[there], trail.norm[there]
    stepped, accumulator = p.unsettle(
        carry.weights, *kept, norms[:rows], carry.accumulator, keep, now, out.memory.norms[:rows], shape
    )
    moved = p.orthogonalise_gradient(made, stepped, rule, shape) if made else stepped
    beta = None if grid.beta is None else grid.beta[here]
    before = trail.moved[here] if trail.moved.numel() else stepped
    direction, momentum, of_beta = p.unmove(moved, carry.momentum, beta, before, keep)
    if out.beta is not None and of_beta is not None:
        out.beta[here] = of_beta
    return Carry(now, momentum, accumulator), direction
