"""Newton–Schulz in Triton: each of its steps is a sum of one or two products and a multiple of a matrix.

All matrices of all heads and sequences are one batch. A result is rounded to its dtype once, which plain bfloat16
arithmetic does two or three times.
"""

import triton
import triton.language as tl


@triton.jit
def _product(
    a, b, i, j, acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a b for tile (i, j); a: [ROWS, INNER], b: [INNER, COLUMNS], or with TURNED its transpose as stored."""
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    for k in range(0, INNER, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        if ROWS % BLOCK == 0 and COLUMNS % BLOCK == 0 and INNER % BLOCK_K == 0:
            left = tl.load(a + rows[:, None] * INNER + inner[None, :])
            if TURNED:
                right = tl.trans(tl.load(b + columns[:, None] * INNER + inner[None, :]))
            else:
                right = tl.load(b + inner[:, None] * COLUMNS + columns[None, :])
        else:
            real = inner < INNER
            left = tl.load(
                a + rows[:, None] * INNER + inner[None, :], mask=(rows < ROWS)[:, None] & real[None, :], other=0.0
            )
            there = columns < COLUMNS
            if TURNED:
                at = b + columns[:, None] * INNER + inner[None, :]
                right = tl.trans(tl.load(at, mask=there[:, None] & real[None, :], other=0.0))
            else:
                at = b + inner[:, None] * COLUMNS + columns[None, :]
                right = tl.load(at, mask=real[:, None] & there[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _place(i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets and mask of tile (i, j) of a [ROWS, COLUMNS] matrix."""
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None] * COLUMNS + columns[None, :], (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]


@triton.jit
def step(
    a, b, c, d, base, out, of_base, of_products,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, TURNED: tl.constexpr, TWO: tl.constexpr,
    BASE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = of_base base + of_products (A B + C D), matrix by matrix (program_id(1)), tile by tile.

    A, C: [ROWS, INNER]; B, D: [INNER, COLUMNS], or with TURNED given as their transposes. TWO: whether there is C D;
    BASE: whether there is a base [ROWS, COLUMNS]. Every buffer holds one matrix behind the other.
    """
    g = tl.program_id(1).to(tl.int64)
    wide: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    i = tl.program_id(0) // wide
    j = tl.program_id(0) - i * wide
    left, right = g * ROWS * INNER, g * INNER * COLUMNS
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    acc = _product(a + left, b + right, i, j, acc, ROWS, COLUMNS, INNER, TURNED, BLOCK, BLOCK_K, PRECISION)
    if TWO:
        acc = _product(c + left, d + right, i, j, acc, ROWS, COLUMNS, INNER, TURNED, BLOCK, BLOCK_K, PRECISION)
    at, real = _place(i, j, ROWS, COLUMNS, BLOCK)
    at += g * ROWS * COLUMNS
    if BASE:
        acc = of_base * tl.load(base + at, mask=real, other=0.0).to(tl.float32) + of_products * acc
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def dots(x, y, out, SIZE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """out [matrices, programs]: parts of the sum of x y over each matrix of SIZE elements, x rounded to ROUNDED."""
    z = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(x + z * SIZE + i, mask=i < SIZE, other=0.0).to(ROUNDED).to(tl.float32)
    right = tl.load(y + z * SIZE + i, mask=i < SIZE, other=0.0).to(ROUNDED).to(tl.float32)
    tl.store(out + z * tl.num_programs(0) + tl.program_id(0), tl.sum(left * right))


@triton.jit
def _total(parts, z, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of parts [matrices, PARTS] of matrix z."""
    at = tl.arange(0, BLOCK)
    return tl.sum(tl.load(parts + z * PARTS + at, mask=at < PARTS, other=0.0))


@triton.jit
def start(
    x, squares, out, norm, eps, SIZE: tl.constexpr, ROUNDED: tl.constexpr, PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x / (‖x‖ + eps) and norm = ‖x‖ of each matrix, rounded to ROUNDED where plain arithmetic rounds."""
    z = tl.program_id(1).to(tl.int64)
    size = tl.sqrt(_total(squares, z, PARTS, PARTS_BLOCK)).to(ROUNDED).to(tl.float32)
    if tl.program_id(0) == 0:
        tl.store(norm + z, size.to(norm.dtype.element_ty))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + z * SIZE + i, mask=i < SIZE, other=0.0).to(ROUNDED).to(tl.float32)
    tl.store(
        out + z * SIZE + i, (value / (size + eps).to(ROUNDED).to(tl.float32)).to(out.dtype.element_ty), mask=i < SIZE
    )


@triton.jit
def start_gradient(
    grad, x, norm, along, out, eps, SIZE: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out, the gradient of what x = X₀ was made from, from that of x. along: parts of the sum of grad x."""
    z = tl.program_id(1).to(tl.int64)
    size = tl.load(norm + z).to(tl.float32)
    total = tl.where(size > 0, _total(along, z, PARTS, PARTS_BLOCK) / size, 0.0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + z * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    value = tl.load(x + z * SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(out + z * SIZE + i, g / (size + eps) - value * total, mask=i < SIZE)
