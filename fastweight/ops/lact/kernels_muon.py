"""Newton–Schulz in Triton: products of all matrices by tiles, element-wise parts in their epilogues.

Each of S, P and the iterate is rounded to its dtype once, which plain bfloat16 arithmetic does two or three times.
Every step of an iteration waits for all tiles of its matrix, forward 15 times. Either each step is a launch, or one
launch does all and the programs of a matrix wait for each other, which needs all of them on the device at once.
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
def _wait(counter, programs, done):
    """Until all `programs` of this matrix have done as many steps as this one. Writes before it are seen after it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < programs * done:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["x_rows", "first", "last"])
def orthogonalise(
    x, out, s, p, coefficients, counters, x_rows, first, last,
    BATCH: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last` of 15: for each of five iterates S = X Xᵀ, P = bS + cSS, X' = aX + PX.

    x: five iterates, x_rows BATCH apart; matrix g at (g // COUNT) BATCH + (g % COUNT) M P, [M, P]. out: the sixth, and
    s, p: one matrix behind the other. coefficients: [5, 3] float32. counters: [matrices] int32 of zeros. A program
    takes the tiles pid, pid + programs, … of matrix program_id(1).
    """
    g = tl.program_id(1).to(tl.int64)
    x += (g // COUNT) * BATCH + (g % COUNT) * M * P
    out += g * M * P
    s += g * M * M
    p += g * M * M
    square: tl.constexpr = (M + BLOCK - 1) // BLOCK
    wide: tl.constexpr = (P + BLOCK - 1) // BLOCK
    x_step = x_rows.to(tl.int64) * BATCH
    for step in range(first, last):
        here = x + (step // 3) * x_step
        c = coefficients + (step // 3) * 3
        if step % 3 == 0:
            for tile in range(tl.program_id(0), square * square, tl.num_programs(0)):
                i = tile // square
                j = tile - i * square
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                acc = _product(here, here, i, j, acc, M, M, P, True, BLOCK, BLOCK_K, PRECISION)
                at, real = _place(i, j, M, M, BLOCK)
                tl.store(s + at, acc.to(s.dtype.element_ty), mask=real)
        elif step % 3 == 1:
            for tile in range(tl.program_id(0), square * square, tl.num_programs(0)):
                i = tile // square
                j = tile - i * square
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                acc = _product(s, s, i, j, acc, M, M, M, True, BLOCK, BLOCK_K, PRECISION)
                at, real = _place(i, j, M, M, BLOCK)
                acc = tl.load(c + 1) * tl.load(s + at, mask=real, other=0.0).to(tl.float32) + tl.load(c + 2) * acc
                tl.store(p + at, acc.to(p.dtype.element_ty), mask=real)
        else:
            for tile in range(tl.program_id(0), square * wide, tl.num_programs(0)):
                i = tile // wide
                j = tile - i * wide
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                acc = _product(p, here, i, j, acc, M, P, M, False, BLOCK, BLOCK_K, PRECISION)
                at, real = _place(i, j, M, P, BLOCK)
                acc += tl.load(c) * tl.load(here + at, mask=real, other=0.0).to(tl.float32)
                if step == 14:
                    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)
                else:
                    tl.store(here + x_step + at, acc.to(x.dtype.element_ty), mask=real)
        if step + 1 < last:
            _wait(counters + g, tl.num_programs(0), step + 1 - first)


@triton.jit(do_not_specialize=["x_rows", "matrices", "first", "last"])
def orthogonalise_gradient(
    x, grad, s, h, p, y, coefficients, counters, x_rows, matrices, first, last,
    BATCH: tl.constexpr, COUNT: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last` of 15: for each iterate from the last S = X Xᵀ and H = G Xᵀ + X Gᵀ, then P = bS + cSS and
    Y = bH + c(HS + SH), then G' = aG + PG + YX.

    x, coefficients, counters: as above. grad: two buffers of `matrices`, one behind the other; G begins in
    the first and ends in the second. s, h, p, y: one [M, M] matrix behind the other.
    """
    g = tl.program_id(1).to(tl.int64)
    x += (g // COUNT) * BATCH + (g % COUNT) * M * P
    grad += g * M * P
    s += g * M * M
    h += g * M * M
    p += g * M * M
    y += g * M * M
    square: tl.constexpr = (M + BLOCK - 1) // BLOCK
    wide: tl.constexpr = (P + BLOCK - 1) // BLOCK
    x_step, grad_step = x_rows.to(tl.int64) * BATCH, matrices.to(tl.int64) * M * P
    for step in range(first, last):
        turn = step // 3
        here = x + (4 - turn) * x_step
        now = grad + (turn % 2) * grad_step
        after = grad + (1 - turn % 2) * grad_step
        c = coefficients + (4 - turn) * 3
        if step % 3 == 0:
            for tile in range(tl.program_id(0), 2 * square * square, tl.num_programs(0)):
                i = tile // 2 // square
                j = tile // 2 - i * square
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                at, real = _place(i, j, M, M, BLOCK)
                if tile % 2 == 0:
                    acc = _product(here, here, i, j, acc, M, M, P, True, BLOCK, BLOCK_K, PRECISION)
                    tl.store(s + at, acc.to(s.dtype.element_ty), mask=real)
                else:
                    acc = _product(now, here, i, j, acc, M, M, P, True, BLOCK, BLOCK_K, PRECISION)
                    acc = _product(here, now, i, j, acc, M, M, P, True, BLOCK, BLOCK_K, PRECISION)
                    tl.store(h + at, acc.to(h.dtype.element_ty), mask=real)
        elif step % 3 == 1:
            for tile in range(tl.program_id(0), 2 * square * square, tl.num_programs(0)):
                i = tile // 2 // square
                j = tile // 2 - i * square
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                at, real = _place(i, j, M, M, BLOCK)
                if tile % 2 == 0:
                    acc = _product(s, s, i, j, acc, M, M, M, True, BLOCK, BLOCK_K, PRECISION)
                    acc = tl.load(c + 1) * tl.load(s + at, mask=real, other=0.0).to(tl.float32) + tl.load(c + 2) * acc
                    tl.store(p + at, acc.to(p.dtype.element_ty), mask=real)
                else:
                    acc = _product(h, s, i, j, acc, M, M, M, True, BLOCK, BLOCK_K, PRECISION)
                    acc = _product(s, h, i, j, acc, M, M, M, True, BLOCK, BLOCK_K, PRECISION)
                    acc = tl.load(c + 1) * tl.load(h + at, mask=real, other=0.0).to(tl.float32) + tl.load(c + 2) * acc
                    tl.store(y + at, acc.to(y.dtype.element_ty), mask=real)
        else:
            for tile in range(tl.program_id(0), square * wide, tl.num_programs(0)):
                i = tile // wide
                j = tile - i * wide
                acc = tl.zeros([BLOCK, BLOCK], tl.float32)
                acc = _product(p, now, i, j, acc, M, P, M, False, BLOCK, BLOCK_K, PRECISION)
                acc = _product(y, here, i, j, acc, M, P, M, False, BLOCK, BLOCK_K, PRECISION)
                at, real = _place(i, j, M, P, BLOCK)
                acc += tl.load(c) * tl.load(now + at, mask=real, other=0.0).to(tl.float32)
                tl.store(after + at, acc.to(grad.dtype.element_ty), mask=real)
        if step + 1 < last:
            _wait(counters + g, tl.num_programs(0), step + 1 - first)
