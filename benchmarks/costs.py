"""The least that each op must compute and move: what a measured time is held against.

Operations count a multiplication and an addition as two. Forward: the products of the definition with the weights read
once per token (no recomputation, nothing outside a window). Forward and backward together: three times as much, 3.5
times for attention (its scores are computed again). Bytes: each token's inputs read once and its output written once;
backward reads them again and writes their gradients.
"""

from typing import NamedTuple

from fastweight.ops.examples import Shape

NEWTON_SCHULZ_PRODUCTS = 15  # five iterations of three products


class Cost(NamedTuple):
    """Floating-point operations and bytes of one pass."""

    flops: float
    bytes: float


def cost(name: str, shape: Shape, element_bytes: int, *, chunk: int, window: int, backward: bool) -> Cost:
    """Of the example called `name` (see fastweight.ops.examples)."""
    per_token = _operations(name, shape, chunk, window)
    tokens = shape.batch * shape.length * shape.heads
    factor = 1.0 if not backward else 3.5 if name.startswith("attention") else 3.0
    width = 5 * shape.dim * shape.heads if name.startswith("In-Place") else 4 * shape.dim
    moved = (tokens // shape.heads if name.startswith("In-Place") else tokens) * width * element_bytes
    return Cost(factor * per_token * tokens, (3 if backward else 1) * moved)


def _operations(name: str, shape: Shape, chunk: int, window: int) -> float:
    """Of one token and head, forward."""
    dim, length = shape.dim, shape.length
    if name.startswith("attention"):
        seen = length if "full" in name else window
        visible = seen - (seen * seen - seen) / (2 * length)  # mean over the tokens of how many keys each sees
        return 4 * dim * visible
    if "delta" in name:
        return 6 * dim * dim  # ask the memory, correct it, read it
    if name.startswith("TTT-Linear"):
        return 6 * dim * dim  # answer, learn, read
    if name.startswith("TTT-MLP"):
        return 14 * dim * 4 * dim  # answer and read through two layers, one layer's backward pass, learn two layers
    if name.startswith("In-Place"):
        full = dim * shape.heads
        return (4 * full * 4 * full + 2 * full * full) / shape.heads  # read, learn, project the targets
    if name.startswith("LaCT"):
        learned = 12 if "all" in name or "momentum" in name else 6
        apply, answer = 6, 4 if learned == 6 else 6
        total = (apply + answer + (6 if learned == 12 else 2)) * dim * dim
        return total + (3 * NEWTON_SCHULZ_PRODUCTS * 2 * dim**3 / chunk if "Muon" in name else 0)
    raise ValueError(f"costs: no example called {name!r}.")
