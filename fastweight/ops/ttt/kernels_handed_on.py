# pyright: reportGeneralTypeIssues=false
"""What the kernels of a held memory hand on to one another, per mini-batch and head (`place`).

Operands of products lie in rows, [places, CHUNK, SIZE]. What only meets accumulators element by element lies as these
do in registers (folded): each thread stores and loads 16 bytes at once, and nothing passes through shared memory to
change owners.
"""

import triton
import triton.language as tl


@triton.jit
def load_own(x, place, i, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What x [·, CHUNK, SIZE] holds of mini-batch and head `place`: [BLOCK_K, BLOCK], zero beyond."""
    j = tl.arange(0, BLOCK)
    at = x + place * (CHUNK * SIZE) + (i[:, None] * SIZE + j[None, :])  # from one place on: short offsets of a thread
    if (CHUNK == BLOCK_K) and (SIZE == BLOCK):
        return tl.load(at)
    return tl.load(at, mask=(i < CHUNK)[:, None] & (j < SIZE)[None, :], other=0.0)


@triton.jit
def store_own(x, value, place, i, CHUNK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    at = x + place * (CHUNK * SIZE) + (i[:, None] * SIZE + j[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=(i < CHUNK)[:, None] & (j < SIZE)[None, :])


@triton.jit
def load_whole(x, place, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Matrix `place` of x [·, D, C]."""
    d, j = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, WHOLE)[None, :]
    at = x + place * (D * C) + (d * C + j)
    if (D == BLOCK_D) and (C == WHOLE):
        return tl.load(at)
    return tl.load(at, mask=(d < D) & (j < C), other=0.0)


@triton.jit
def store_folded(
    x, tile, place, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_K, BLOCK] as number `place` of x [·, BLOCK_K · BLOCK], zero beyond [CHUNK, SIZE].

    Any order is right that `load_folded` knows. This one is that of 16-row accumulators whose columns are dealt to the
    warps eight by eight: of a thread, rows g and g + 8, columns 2 c and 2 c + 1 of every eighth its warp has.
    """
    if (CHUNK < BLOCK_K) or (SIZE < BLOCK):
        inside = (tl.arange(0, BLOCK_K) < CHUNK)[:, None] & (tl.arange(0, BLOCK) < SIZE)[None, :]
        tile = tl.where(inside, tile, 0.0)
    warps: tl.constexpr = min(WARPS, BLOCK // 8)
    many: tl.constexpr = BLOCK // (8 * warps)
    inner: tl.constexpr = min(many, 32 // x.dtype.element_ty.primitive_bitwidth)
    parts = tl.reshape(tile, [2, BLOCK_K // 2, many // inner, inner, warps, 4, 2])
    flat = tl.reshape(tl.permute(parts, [2, 4, 1, 5, 3, 0, 6]), [BLOCK_K * BLOCK])
    at = x + place * (BLOCK_K * BLOCK) + tl.arange(0, BLOCK_K * BLOCK)
    tl.store(at, flat.to(x.dtype.element_ty))


@triton.jit
def load_folded(x, place, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Tile number `place` of x as `store_folded` left it: [BLOCK_K, BLOCK]."""
    warps: tl.constexpr = min(WARPS, BLOCK // 8)
    many: tl.constexpr = BLOCK // (8 * warps)
    inner: tl.constexpr = min(many, 32 // x.dtype.element_ty.primitive_bitwidth)
    flat = tl.load(x + place * (BLOCK_K * BLOCK) + tl.arange(0, BLOCK_K * BLOCK))
    parts = tl.reshape(flat, [many // inner, warps, BLOCK_K // 2, 4, inner, 2, 2])
    return tl.reshape(tl.permute(parts, [5, 2, 0, 4, 1, 3, 6]), [BLOCK_K, BLOCK])
