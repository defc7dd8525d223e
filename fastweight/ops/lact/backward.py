"""The backward pass of the unit: reads of all chunks at once, then the updates from the last to the first."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact.forward import needs_exact
from fastweight.ops.lact.grid import Carry, Grid, Memory, Shape, Trail
from fastweight.ops.lact.muon import Iterates
from fastweight.ops.lact.pieces import TORCH, Pieces, add_product, multiply, split_product
from fastweight.state import zip_tensors

NO_UPDATE = (slice(0, 0), slice(0, 0))  # after the last chunk


class Second(NamedTuple):
    """Of the first r chunks of the grid (all but the last of each sequence), for products that no update waits for.

    asked: [r, H, L], the gradient of their directions, in the compute dtype. left: [r, H, C, 4F], [lr0 ∂a | lr2 ∂u |
    gradient of a | of u]; right: [r, H, C, 2F], [lr1 hidden | gradient of g], as `pieces.swiglu_second` gives them.
    Zero in rows that nothing is learned from. left and right are empty where they are not needed.
    """

    asked: Tensor
    left: Tensor
    right: Tensor

    def rows(self, part: slice) -> "Second":
        return Second(*(t[part] for t in self))


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
    second = _begin(grid, trail, rule, shape)
    made = [] if rule.muon == "none" else p.iterates(trail.moved[active[0] :], rule, shape)
    final = Carry(shape.learned(end.weights, rule), end.momentum, end.accumulator)
    carry = final.rows(slice(0, 0))
    for i, (here, there) in reversed(list(enumerate([*shape.updates(), NO_UPDATE]))):
        now = shape.learned(read[shape.chunk(i)], rule)  # where the gradient of this chunk's weights adds up
        going = len(carry.weights)
        if going:
            part = [group.rows(slice(there.start - active[0], there.stop - active[0])) for group in made]
            asked = second.asked[here]
            carry = _update_gradient(
                carry, here, there, trail, part, norms, grid, good, out, now[:going], asked, rule, shape, p
            )
            if not late:
                directions_gradient(
                    grid.rows(here), trail.weights[here], second.rows(here), good[here], rule, shape, p, now[:going],
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
        outer_gradient(grid, trail.weights, second.asked, good, shape, p, inner, out)
        weights = torch.cat([_of_fixed(inner, end.weights, shape), weights], -1)
    elif second.left.numel():
        _token_gradients(trail.weights, second, shape, out)
    return out._replace(memory=Memory(weights, out.memory.norms, carry.momentum, carry.accumulator))


def read_gradient(
    q: Tensor, weights: Tensor, y: Tensor, wide: torch.dtype, shape: Shape, p: Pieces
) -> tuple[Tensor, Tensor]:
    """Gradients of q and of the flat weights that each chunk is read with, from that of y."""
    inner = shape.inner(weights)
    both, hidden = p.swiglu_gradient(q @ inner.mT, y @ shape.outer(weights), None)
    of_weights = weights.new_empty(weights.shape, dtype=wide)
    multiply(both.mT, q, shape.inner(of_weights))
    multiply(y.mT, hidden, shape.outer(of_weights))
    return both @ inner, of_weights


def directions_gradient(
    grid: Grid, weights: Tensor, second: Second, good: Tensor, rule: Rule, shape: Shape, p: Pieces, total: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Of a chunk, from the gradient of its directions: add that of its flat weights to total, fill second and the
    gradient of lr, the last of `into`; with rates per channel also those of k and v, the first two."""
    low, left, right = second
    if grid.lr.shape[-1] > 1:
        inner, outer = (shape.inner(low), shape.inner(weights)), (shape.outer(low), shape.outer(weights))
        left, right = _by_channel(grid, inner, outer, good, shape, *into)
    else:
        of_lr, hidden = into[2], shape.hidden
        values = left, right
        if needs_exact(rule, shape):
            # Newton–Schulz in float32 hands on what other roundings leave: those of these products can be avoided.
            values = left.new_empty(left.shape, dtype=of_lr.dtype), right.new_empty(right.shape, dtype=of_lr.dtype)
            _from_weights(grid, weights, *values, shape)
        multiply(grid.k, shape.inner(low).mT, values[0][..., : 2 * hidden])
        multiply(grid.v, shape.outer(low), values[1][..., :hidden])
        for t, new in zip((left, right), p.swiglu_second(*values, grid.lr, good, of_lr), strict=True):
            t.copy_(new)
    add_product(shape.inner(total), left[..., 2 * shape.hidden :].mT, grid.k)
    add_product(shape.outer(total), grid.v.mT, right[..., shape.hidden :])


def _begin(grid: Grid, trail: Trail, rule: Rule, shape: Shape) -> Second:
    """What needs no gradient from a later chunk: products of tokens and weights, of all chunks at once."""
    late, rows, size = rule.update == "w1", shape.offset[-2], grid.k.shape[1:3]
    new = trail.weights.new_zeros if late else trail.weights.new_empty
    asked = new(len(trail.raw) if late else rows, *trail.raw.shape[1:])
    separate = late or grid.lr.shape[-1] > 1
    left, right = (grid.k.new_empty(0 if separate else rows, *size, parts * shape.hidden) for parts in (4, 2))
    found = Second(asked, left, right)
    for part in shape.unlearned():
        for t in found:
            t[part] = 0
    if not separate and not needs_exact(rule, shape):
        _from_weights(grid.rows(slice(rows)), trail.weights[:rows], left, right, shape)
    return found


def _from_weights(grid: Grid, weights: Tensor, left: Tensor, right: Tensor, shape: Shape) -> None:
    """Fill the second halves of left and right: [a | u] and g."""
    multiply(grid.k, shape.inner(weights).mT, left[..., 2 * shape.hidden :])
    multiply(grid.v, shape.outer(weights), right[..., shape.hidden :])


def _token_gradients(weights: Tensor, second: Second, shape: Shape, out: Gradients) -> None:
    """Fill the gradients of k and v."""
    (asked, left, right), hidden, rows = second, shape.hidden, len(second.asked)
    of_k, of_v, weights = out.k[:rows], out.v[:rows], weights[:rows]
    multiply(left[..., : 2 * hidden], shape.inner(asked), of_k)
    add_product(of_k, left[..., 2 * hidden :], shape.inner(weights))
    multiply(right[..., :hidden], shape.outer(asked).mT, of_v)
    add_product(of_v, right[..., hidden:], shape.outer(weights).mT)


def _by_channel(
    grid: Grid, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], good: Tensor, shape: Shape, of_k: Tensor,
    of_v: Tensor, of_lr: Tensor,
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
    left, right = left.to(k.dtype), right.to(k.dtype)
    multiply(right[..., : shape.hidden], outer[0].mT, of_v)
    add_product(of_v, right[..., shape.hidden :], outer[1].mT)
    return left, right


def outer_gradient(
    grid: Grid, weights: Tensor, direction: Tensor, good: Tensor, shape: Shape, p: Pieces, total: Tensor,
    out: Gradients,
) -> None:  # fmt: skip
    """Fill the gradients of k, v and the rates of w1 of every chunk, from that of its direction for w1 alone; add that
    of w0 and w2 to total [R, H, 2FD]."""
    inner, asked = shape.inner(weights), shape.outer(direction)
    hidden, gx, lr = p.hidden_second(grid.k @ inner.mT, grid.v @ asked, grid.lr[:, :, 1], good)
    add_product(total.unflatten(-1, inner.shape[-2:]), gx.mT, grid.k)
    multiply(gx, inner, out.k)
    multiply(hidden, asked.mT, out.v)
    out.lr[:, :, 1] = lr


def _of_fixed(read: Tensor, end: Tensor, shape: Shape) -> Tensor:
    """The gradient of w0 and w2 [N, H, 2FD], which all chunks share, from those of each chunk's and of the end's."""
    fixed = end[..., : read.shape[-1]]
    if len(set(shape.active)) == 1:
        return fixed + read.unflatten(0, (len(shape.active), -1)).sum(0)
    fixed = fixed.clone()
    for i, rows in enumerate(shape.active):
        fixed[:rows] += read[shape.chunk(i)]
    return fixed


def _empty_gradients(q: Tensor, grid: Grid, end: Memory, norms: Tensor, shape: Shape, *, late: bool) -> Gradients:
    """To be filled: of every chunk but the last ones, which nothing is learned from; of all chunks at once if late."""
    k, v = torch.empty_like(grid.k), torch.empty_like(grid.v)
    lr = torch.zeros_like(grid.lr) if late else torch.empty_like(grid.lr)
    beta = None if grid.beta is None else torch.zeros_like(grid.beta)
    for part in shape.unlearned():
        for t in (k, v, lr):
            t[part] = 0
    return Gradients(q, k, v, lr, beta, end._replace(norms=torch.zeros_like(norms)))


def _update_gradient(
    carry: Carry, here: slice, there: slice, trail: Trail, made: list[Iterates], norms: Tensor, grid: Grid,
    good: Tensor, out: Gradients, now: Tensor, asked: Tensor, rule: Rule, shape: Shape, p: Pieces,
) -> Carry:  # fmt: skip
    """The carried gradients before the update `here` → `there`; fills norms, beta and asked, the gradient of its
    direction, and adds that of the weights to now."""
    keep, rows = good[here], there.stop - there.start
    kept = trail.raw[there], trail.norm[there]
    stepped, accumulator = p.unsettle(
        carry.weights, *kept, norms[:rows], carry.accumulator, keep, now, out.memory.norms[:rows], shape
    )
    moved = p.orthogonalise_gradient(made, stepped, rule, shape) if made else stepped
    beta = None if grid.beta is None else grid.beta[here]
    before = trail.moved[here] if trail.moved.numel() else stepped
    momentum, of_beta = p.unmove(moved, carry.momentum, beta, before, keep, asked)
    if out.beta is not None and of_beta is not None:
        out.beta[here] = of_beta
    return Carry(now, momentum, accumulator)
