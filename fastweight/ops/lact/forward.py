"""The forward pass of the unit: directions of each chunk, the weights' recurrence, all reads in one product."""

import torch
from torch import Tensor

from fastweight.ops.lact import Rule
from fastweight.ops.lact.grid import Carry, Grid, Memory, Shape, Trail
from fastweight.ops.lact.pieces import Pieces, product, token_sum
from fastweight.state import map_tensors, zip_tensors


def run(
    grid: Grid, memory: Memory, rule: Rule, active: list[int], p: Pieces, *, save: bool, trail: Trail | None = None
) -> tuple[Tensor, Memory, Tensor, Trail]:
    """(y [R, H, C, D], the memory after the last update, [R] bool: which updates happened, the trail).

    trail: to be filled, made if None.
    """
    shape = Shape.of(grid, memory.weights, active)
    trail = empty_trail(grid.q, memory, rule, save=save) if trail is None else trail
    _begin(trail, memory, rule, shape)
    happened = torch.zeros_like(grid.due)
    carry, done = Carry(shape.learned(memory.weights, rule), memory.momentum, memory.accumulator), []
    # Directions of w1 alone do not depend on it, so those of all chunks are one product.
    exact = needs_exact(rule, shape)
    early = rule.update == "w1" and not exact
    ready = directions(grid, trail.weights, shape, rule, p) if early else None
    for here, there in shape.updates():
        going = there.stop - there.start
        done.append(carry.rows(slice(going, None)))
        carry, part = carry.rows(slice(going)), grid.rows(here)
        if ready is None:
            weights = _all(memory, carry, rule) if exact else trail.weights[here]
            direction = directions(part, weights, shape, rule, p)
        else:
            direction = map_tensors(lambda t, here=here: t[here], ready)
        carry, happened[here] = _update(carry, direction, memory.norms[:going], part, there, trail, rule, shape, p)
    done.append(carry)
    carry = zip_tensors(lambda *parts: torch.cat(parts), *reversed(done))
    y = read(grid.q, trail.weights, shape, p)
    end = Memory(_all(memory, carry, rule), memory.norms, carry.momentum, carry.accumulator)
    return y, end, happened, trail


def read(q: Tensor, weights: Tensor, shape: Shape, p: Pieces) -> Tensor:
    """y = f(q) of each chunk: [R, H, C, D]."""
    return p.swiglu(q @ shape.inner(weights).mT) @ shape.outer(weights).mT


def directions(grid: Grid, weights: Tensor, shape: Shape, rule: Rule, p: Pieces) -> tuple[Tensor | None, Tensor]:
    """Σ over each chunk's tokens of lr · ∇⟨f(k), v⟩ of [w0; w2] [rows, H, 2F, D] (None if fixed), w1 [rows, H, D, F].

    weights: all, in the dtype of the tokens, or in the state's if the products must not round them.
    """
    wide = grid.lr.dtype
    both = product(grid.k, shape.inner(weights).mT)
    if rule.update == "w1":
        return None, token_sum(grid.v, p.swiglu(both, grid.lr[:, :, 1]), wide)
    g = product(grid.v, shape.outer(weights))
    if grid.lr.shape[-1] == 1:
        both, hidden = p.swiglu_gradient(both, g, grid.lr)
        return token_sum(both, grid.k, wide), token_sum(grid.v, hidden, wide)
    both, hidden = p.swiglu_gradient(both, g, None)
    keys = (grid.k * grid.lr[:, :, j] for j in (0, 2))  # wide: rates per channel are not rounded into the tokens
    inner = torch.cat([token_sum(a, k, wide) for a, k in zip(both.chunk(2, -1), keys, strict=True)], -2)
    return inner, token_sum(grid.v, hidden * grid.lr[:, :, 1], wide)


def needs_exact(rule: Rule, shape: Shape) -> bool:
    """Newton–Schulz in float32 multiplies rounding errors of its input by five: that must come from exact products."""
    return rule.muon != "none" and rule.muon_dtype == "float32" and not shape.exact


def _all(memory: Memory, carry: Carry, rule: Rule) -> Tensor:
    """All three matrices of the carried rows: [rows, H, 3FD]."""
    if rule.update == "all":
        return carry.weights
    fixed = memory.weights[: len(carry.weights), :, : -carry.weights.shape[-1]]
    return torch.cat([fixed, carry.weights], -1)


def _begin(trail: Trail, memory: Memory, rule: Rule, shape: Shape) -> None:
    """Write the trail's first chunks; with `update` "w1" also w0 and w2 of all, which never change."""
    if trail.moved.numel() and memory.momentum is not None:
        trail.moved[: shape.active[0]] = memory.momentum
    for i, rows in enumerate(shape.active):
        if i == 0 or rule.update == "w1":
            trail.weights[shape.chunk(i)] = memory.weights[:rows]


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
    )


def _update(
    carry: Carry, direction: tuple, norms: Tensor, part: Grid, there: slice, trail: Trail, rule: Rule, shape: Shape,
    p: Pieces,
) -> tuple[Carry, Tensor]:  # fmt: skip
    """The carried rows after one update, written to the trail's rows `there`; [rows] bool: whether it happened."""
    saved = trail.raw.numel() > 0
    moved = trail.moved[there] if trail.moved.numel() else torch.empty_like(carry.weights)
    raw = trail.raw[there] if saved else torch.empty_like(carry.weights)
    norm = trail.norm[there] if saved else torch.empty_like(norms)
    base = carry.weights if carry.accumulator is None else carry.accumulator
    if rule.muon == "none":
        energy = p.move_rows(direction, carry.momentum, part.beta, moved, base, raw, norm, shape)
    else:
        energy = p.move(direction, carry.momentum, part.beta, moved)
        p.add_rows(p.orthogonalise(moved, rule, shape), base, raw, norm, shape)
    low = shape.learned(trail.weights[there], rule)
    weights, good = p.settle(carry, moved, energy, raw, norm, norms, part.due, low, shape)
    return Carry(weights, None if carry.momentum is None else moved, None if carry.accumulator is None else raw), good
