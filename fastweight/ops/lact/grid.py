"""What the unit works on: tokens by chunk, flat memories, and what the forward pass leaves for the backward pass."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.state import map_tensors

if TYPE_CHECKING:
    from fastweight.ops.lact.pieces import Pieces


class Tokens(NamedTuple):
    """Tokens by chunk, as the op lays them. q, k, v: [R, C, H, D]. lr: [R, C, H, 3, 1 or D]. beta: [R, C, H] or None.
    due: [R] bool, whether the chunk's update may happen."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    beta: Tensor | None
    due: Tensor


class Grid(NamedTuple):
    """Tokens by chunk, heads first, in the compute dtype. R chunks as a `ChunkPlan` lays them.

    q, k, v: [R, H, C, D]. lr: [R, H, 3, C, 1], or [R, H, 3, C, D] with rates per channel. beta: [R, H] or None, the
    mean momentum coefficient. due: [R] bool, whether the chunk may be learned: all but q of other chunks is zero.
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
    [R, H, L], the direction after momentum of the update that made them (a first chunk's: the momentum given). Empty
    where not needed.
    """

    weights: Tensor
    raw: Tensor
    norm: Tensor
    moved: Tensor


class Shape(NamedTuple):
    """dim: D. hidden: F. active: rows that have chunk i. offset: first row of chunk i on the grid. exact: products of
    tokens are as exact as the state."""

    dim: int
    hidden: int
    active: list[int]
    offset: list[int]
    exact: bool

    @staticmethod
    def of(grid: Grid, weights: Tensor, active: list[int]) -> "Shape":
        dim = grid.q.shape[-1]
        offset = [0]
        for rows in active:
            offset.append(offset[-1] + rows)
        return Shape(dim, weights.shape[-1] // (3 * dim), active, offset, grid.k.dtype == grid.lr.dtype)

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

    def unlearned(self) -> list[slice]:
        """Grid rows of the chunks that nothing is learned from: the last ones."""
        pairs = zip(self.offset, self.offset[1:], [*self.active[1:], 0], strict=False)
        return [slice(a + learned, b) for a, b, learned in pairs]

    def updates(self) -> list[tuple[slice, slice]]:
        """(grid rows learned from, grid rows that they make) of each update, in order."""
        pairs = zip(self.offset[:-2], self.offset[1:-1], self.active[1:], strict=True)
        return [(slice(a, a + rows), slice(b, b + rows)) for a, b, rows in pairs]


class Carry(NamedTuple):
    """What one update hands to the next, [rows, H, L] each: weights that learn, momentum and accumulator or None."""

    weights: Tensor
    momentum: Tensor | None
    accumulator: Tensor | None

    def rows(self, part: slice) -> "Carry":
        return map_tensors(lambda t: t[part], self)


def learnable(tokens: Tokens, p: "Pieces", out: Tensor | None = None) -> Tensor:
    """[R] bool: the chunks that are due and hold nothing but finite numbers. out: a tensor to fill."""
    good = tokens.due.clone() if out is None else out.copy_(tokens.due)
    p.keep_finite(tokens.k, good)
    p.keep_finite(tokens.v, good)
    p.keep_finite(tokens.lr.flatten(2, 3), good)
    if tokens.beta is not None:
        p.keep_finite(tokens.beta[..., None], good)
    return good


def make_grid(tokens: Tokens, good: Tensor, dtype: torch.dtype, p: "Pieces", into: Grid | None = None) -> Grid:
    """The tokens heads first, in `dtype`; of chunks that are not good [R] only q. into: tensors to fill but for `due`.

    The forward pass learns from chunks that are `learnable`. For the backward pass those are good whose update
    happened: a gradient comes from no other.
    """
    q, k, v, lr, beta, _ = tokens
    at = Grid(*[None] * 6) if into is None else into  # type: ignore[arg-type]  # made below where there are none
    rates = p.swap(lr.flatten(2, 3), lr.dtype, good, out=None if at.lr is None else at.lr.flatten(1, 2))
    if beta is not None:
        beta = torch.mean(beta, 1, out=at.beta).masked_fill_(~good[:, None], 0)
    return Grid(
        p.swap(q, dtype, out=at.q), p.swap(k, dtype, good, out=at.k), p.swap(v, dtype, good, out=at.v),
        rates.unflatten(1, lr.shape[2:4]), beta, good,
    )  # fmt: skip
