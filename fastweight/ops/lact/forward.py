"""The forward pass of the unit: directions of each chunk, the weights' recurrence, all reads in one product."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact import pieces as p
from fastweight.ops.lact.muon import muon_dtype, orthogonalise
from fastweight.state import map_tensors, zip_tensors


class Grid(NamedTuple):
    """Tokens by chunk, heads first, in the compute dtype, zero where not finite. R chunks as a `ChunkPlan` lays them.

    q, k, v: [R, H, C, D]. lr: [R, H, 3, C, 1], or [R, H, 3, C, D] with rates per channel. beta: [R, H] or None, the
    mean momentum coefficient. due: [R] bool, whether the chunk's update may happen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    beta: Tensor | None
    due: Tensor

    def rows(self, part: slice) -> "Grid":
        return map_tensors(lambda t: t[part], self)


class Memory(NamedTuple):
    """The memory of each row, flat: weights [N, H, 3FD] in the order w0, w2, w1; L of them, all or w1, are learned.

    norms: [N, H, rows]. momentum, accumulator: [N, H, L] or None.
    """

    weights: Tensor
    norms: Tensor
    momentum: Tensor | None
    accumulator: Tensor | None


class Trail(NamedTuple):
    """What the backward pass needs of each chunk's memory, [R, …]; only of the chunks that an update made or read.

    weights: [R, H, 3FD], that the chunk is read with, in the compute dtype. raw: [R, H, L], these before their rows
    were scaled (a first chunk's: as given); norm: [R, H, rows], the row norms of raw, 0 in first chunks. moved:
    [R, H, L], the direction after momentum of the update that made them (a first chunk's: the momentum given).
    iterates: [5, R, H, L]. Empty where not needed.
    """

    weights: Tensor
    raw: Tensor
    norm: Tensor
    moved: Tensor
    iterates: Tensor


class Shape(NamedTuple):
    """dim: D. hidden: F. active: rows that have chunk i. offset: first row of chunk i on the grid."""

    dim: int
    hidden: int
    active: list[int]
    offset: list[int]

    @staticmethod
    def of(q: Tensor, weights: Tensor, active: list[int]) -> "Shape":
        dim = q.shape[-1]
        offset = [0]
        for rows in active:
            offset.append(offset[-1] + rows)
        return Shape(dim, weights.shape[-1] // (3 * dim), active, offset)

    def learned(self, flat: Tensor, rule: Rule) -> Tensor:
        """The part of the weights that learns."""
        return flat if rule.update == "all" else flat[..., 2 * self.hidden * self.dim :]

    def inner(self, flat: Tensor) -> Tensor:
        """[w0; w2] of flat weights, or of directions of all: [..., 2F, D]."""
        return flat[..., : 2 * self.hidden * self.dim].unflatten(-1, (2 * self.hidden, self.dim))

    def outer(self, flat: Tensor) -> Tensor:
        """w1 of flat weights or directions: [..., D, F]."""
        return flat[..., -self.hidden * self.dim :].unflatten(-1, (self.dim, self.hidden))

    def by_rows(self, flat: Tensor) -> list[Tensor]:
        """Views [..., rows, columns] of learned flat weights, whose rows follow each other in `norms`."""
        if flat.shape[-1] == self.hidden * self.dim:
            return [self.outer(flat)]
        if self.hidden == self.dim:
            return [flat.unflatten(-1, (-1, self.dim))]
        return [self.inner(flat), self.outer(flat)]

    def chunk(self, i: int) -> slice:
        """Grid rows of chunk i."""
        return slice(self.offset[i], self.offset[i + 1])

    def updates(self) -> list[tuple[slice, slice]]:
        """(grid rows learned from, grid rows that they make) of each update, in order."""
        pairs = zip(self.offset[:-2], self.offset[1:-1], self.active[1:], strict=True)
        return [(slice(a, a + rows), slice(b, b + rows)) for a, b, rows in pairs]


class Carry(NamedTuple):
    """What one update hands to the next: weights [rows, H, 3FD], momentum and accumulator [rows, H, L] or None."""

    weights: Tensor
    momentum: Tensor | None
    accumulator: Tensor | None

    def rows(self, part: slice) -> "Carry":
        return map_tensors(lambda t: t[part], self)


def run(
    grid: Grid, memory: Memory, rule: Rule, active: list[int], *, save: bool
) -> tuple[Tensor, Carry, Tensor, Trail]:
    """(y [R, H, C, D], the memory after the last update, [R] bool: which updates happened, the trail)."""
    shape = Shape.of(grid.q, memory.weights, active)
    trail = _begin(grid, memory, rule, shape, save=save)
    finite = torch.ones_like(grid.due)
    carry, done = Carry(memory.weights, memory.momentum, memory.accumulator), []
    ready = directions(grid, trail.weights, carry.weights.dtype, shape, rule) if rule.update == "w1" else None
    for here, there in shape.updates():
        going = there.stop - there.start
        done.append(carry.rows(slice(going, None)))
        carry, part = carry.rows(slice(going)), grid.rows(here)
        if ready is None:
            direction = directions(part, trail.weights[here], carry.weights.dtype, shape, rule)
        else:
            direction = ready[here]
        carry, finite[here] = _update(carry, direction, memory.norms[:going], part, there, trail, rule, shape)
    done.append(carry)
    carry = zip_tensors(lambda *parts: torch.cat(parts), *reversed(done))
    y = read(grid.q, trail.weights, shape)
    return y, carry, finite & grid.due, trail


def read(q: Tensor, weights: Tensor, shape: Shape) -> Tensor:
    """y = f(q) of each chunk: [R, H, C, D]."""
    return p.swiglu(q @ shape.inner(weights).mT) @ shape.outer(weights).mT


def directions(grid: Grid, weights: Tensor, dtype: torch.dtype, shape: Shape, rule: Rule) -> Tensor:
    """Σ over each chunk's tokens of lr · ∇⟨f(k), v⟩, flat: [rows, H, L]."""
    both = grid.k @ shape.inner(weights).mT
    if rule.update == "w1":
        rates = grid.lr[:, :, 1]
        return p.wide_product(grid.v.mT, (p.swiglu(both) * rates).to(grid.v.dtype), dtype).flatten(-2)
    g = grid.v @ shape.outer(weights)
    narrow = grid.lr.shape[-1] == 1
    both, hidden = p.swiglu_gradient(both, g, grid.lr if narrow else None)
    if narrow:
        inner = p.wide_product(both.mT, grid.k, dtype)
    else:
        hidden = (hidden * grid.lr[:, :, 1]).to(hidden.dtype)
        scaled = [(grid.k * grid.lr[:, :, j]).to(grid.k.dtype) for j in (0, 2)]
        parts = zip(both.chunk(2, -1), scaled, strict=True)
        inner = torch.cat([p.wide_product(a.mT, k, dtype) for a, k in parts], -2)
    return torch.cat([inner.flatten(-2), p.wide_product(grid.v.mT, hidden, dtype).flatten(-2)], -1)


def _begin(grid: Grid, memory: Memory, rule: Rule, shape: Shape, *, save: bool) -> Trail:
    """The trail with its first chunks written; with `update` "w1" also w0 and w2 of all, which never change."""
    trail = empty_trail(grid.q, memory, rule, save=save)
    if trail.moved.numel() and memory.momentum is not None:
        trail.moved[: shape.active[0]] = memory.momentum
    for i, rows in enumerate(shape.active):
        if i == 0 or rule.update == "w1":
            trail.weights[shape.chunk(i)] = memory.weights[:rows]
    return trail


def empty_trail(q: Tensor, memory: Memory, rule: Rule, *, save: bool) -> Trail:
    """A trail to be filled, for queries [R, H, C, D]; of the weights alone if it need not be saved."""
    chunks, heads = q.shape[:2]
    learned = memory.weights.shape[-1] // (1 if rule.update == "all" else 3)
    rows, muon = chunks if save else 0, rule.muon != "none"
    raw = memory.weights.new_empty(rows, heads, learned)
    return Trail(
        q.new_empty(chunks, heads, memory.weights.shape[-1]),
        raw,
        raw.new_empty(rows, heads, memory.norms.shape[-1]),
        raw.new_empty(rows if muon or memory.momentum is not None else 0, heads, learned),
        raw.new_empty(5, rows if muon else 0, heads, learned, dtype=muon_dtype(rule, raw.dtype)),
    )


def _update(
    carry: Carry, direction: Tensor, norms: Tensor, part: Grid, there: slice, trail: Trail, rule: Rule, shape: Shape
) -> tuple[Carry, Tensor]:
    """The carried rows after one update, written to the trail's rows `there`; [rows] bool: nothing was not finite."""
    moved = direction
    if carry.momentum is not None and part.beta is not None:
        moved = direction + part.beta[..., None] * carry.momentum
    saved, stepped = trail.raw.numel() > 0, moved
    if rule.muon != "none":
        stepped = orthogonalise(moved, rule, shape.dim, shape.hidden, trail.iterates[:, there] if saved else None)
    old = shape.learned(carry.weights, rule)
    raw = stepped + (old if carry.accumulator is None else carry.accumulator)
    scaled, norm = _rescale(raw, norms, shape)
    finite = (moved.square().sum((1, 2)) + norm.sum((1, 2))).isfinite()
    good = finite & part.due
    new = p.where(good, scaled, old)
    if rule.update == "w1":
        new = torch.cat([carry.weights[..., : -new.shape[-1]], new], -1)
    momentum = None if carry.momentum is None else p.where(good, moved, carry.momentum)
    accumulator = None if carry.accumulator is None else p.where(good, raw, carry.accumulator)
    trail.weights[there] = new
    if saved:
        trail.raw[there], trail.norm[there] = raw, norm
        if trail.moved.numel():
            trail.moved[there] = moved if momentum is None else momentum
    return Carry(new, momentum, accumulator), finite | ~part.due


def _rescale(raw: Tensor, norms: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """(raw with its rows scaled to `norms`, the row norms it had)."""
    parts = shape.by_rows(raw)
    found = [p.rescale(part, t) for part, t in zip(parts, norms.split([x.shape[-2] for x in parts], -1), strict=True)]
    scaled, norm = zip(*found, strict=True)
    return torch.cat([t.flatten(-2) for t in scaled], -1), torch.cat(norm, -1)
