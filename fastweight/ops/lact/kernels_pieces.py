"""The element-wise pieces of `pieces.py` in Triton: one pass over memory each, arithmetic in float32.

Rows of the hidden layer are numbered z C + t: z the chunk's sequence and head, t the token. A batch is one sequence
and head of flat memory. Lengths that vary with the input are not specialised.
"""

import triton
import triton.language as tl

EPS: tl.constexpr = tl.constexpr(1e-5)  # of the row norms, as in the op


@triton.jit(do_not_specialize=["first", "second", "count"])
def swap(
    source, target, good, first, second, count, row_stride, first_stride, second_stride,
    D: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target [R, second, first, D] = source [R, first, second, D], its last dimension without gaps, in target's dtype.
    MASKED: zero in the R that are not good. count: rows of D elements."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r = place // (first * second)
    inside = place - r * first * second
    j = inside // first
    i = inside - j * first
    known = place < count
    wanted = known
    if MASKED:
        wanted = known & (tl.load(good + r, mask=known, other=0) != 0)
    at = source + (r * row_stride + i * first_stride + j * second_stride)[:, None] + column[None, :]
    value = tl.load(at, mask=wanted[:, None] & (column < D)[None, :], other=0.0)
    to = target + place[:, None] * D + column[None, :]
    tl.store(to, value.to(target.dtype.element_ty), mask=known[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["rows", "heads"])
def keep_finite(
    values, good, rows, heads, chunk_stride, token_stride, head_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Clear good [R] where values [R, tokens, heads, D], the last dimension without gaps, are not all finite.

    rows: tokens times heads of a chunk. Programs go through a chunk's rows, then to the next chunk; those that find
    something all write the same, so their order does not matter."""
    blocks = tl.cdiv(rows, ROWS)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = values + (r * chunk_stride + row // heads * token_stride + row % heads * head_stride)[:, None]
    real = (row < rows)[:, None] & (column < D)[None, :]
    value = tl.load(at + column[None, :], mask=real, other=0.0).to(tl.float32)
    finite = (tl.abs(value) < float("inf")).to(tl.int32)
    if tl.min(tl.min(finite, 1), 0) == 0:
        tl.store(good + r, 0)


@triton.jit(do_not_specialize=["chunks", "size"])
def count_refused(
    due, good, row, number, order, started, count, first, count_out, first_out, chunks, size, BLOCK: tl.constexpr
):
    """Grid: sequences. Updates that were due [R] and are not among the good [R], added to count [N] and first [N].

    row, number: [R] and order, started: [N] of the `Layout`, of chunks of `size` tokens."""
    n, r = tl.program_id(0), tl.arange(0, BLOCK)
    latest = tl.full([], 1 << 62, tl.int64)
    found, earliest = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64) + latest
    for offset in range(0, chunks, BLOCK):
        at = offset + r
        there = at < chunks
        own = tl.load(order + tl.load(row + at, mask=there, other=0), mask=there, other=0) == n
        wanted, done = tl.load(due + at, mask=there, other=0), tl.load(good + at, mask=there, other=0)
        refused = there & own & (wanted > done)
        found += refused.to(tl.int32)
        earliest = tl.minimum(earliest, tl.where(refused, tl.load(number + at, mask=there, other=0), latest))
    total, old = tl.sum(found), tl.load(first + n)
    tl.store(count_out + n, tl.load(count + n) + total)
    new = tl.load(started + n) + tl.min(earliest) * size
    tl.store(first_out + n, tl.where((old < 0) & (total > 0), new, old))


@triton.jit(do_not_specialize=["count", "C"])
def swiglu(both, hidden, lr, count, C, F: tl.constexpr, RATES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """hidden [count, F] = silu(a) u of both = [a | u] [count, 2F], with RATES times lr of w1 in [z, 3, C]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (row < count)[:, None] & (column < F)[None, :]
    at = both + row[:, None] * 2 * F + column[None, :]
    a = tl.load(at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
    out = a * tl.sigmoid(a) * u
    if RATES:
        out *= tl.load(lr + (row // C) * 3 * C + row % C, mask=row < count, other=0.0).to(tl.float32)[:, None]
    tl.store(hidden + row[:, None] * F + column[None, :], out.to(hidden.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["count", "C"])
def swiglu_gradient(
    both, g, lr, count, C, F: tl.constexpr, RATES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """In place: both = [a | u] becomes [lr0 ∂a | lr2 ∂u], and g [count, F] becomes lr1 hidden. lr: [z, 3, C]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (row < count)[:, None] & (column < F)[None, :]
    at = both + row[:, None] * 2 * F + column[None, :]
    of_g = g + row[:, None] * F + column[None, :]
    a = tl.load(at, mask=real, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
    h = tl.load(of_g, mask=real, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    silu = a * s
    first, second, third = h * u * (s + silu * (1 - s)), silu * u, h * silu
    if RATES:
        rate = lr + (row // C) * 3 * C + row % C
        known = row < count
        first *= tl.load(rate, mask=known, other=0.0).to(tl.float32)[:, None]
        second *= tl.load(rate + C, mask=known, other=0.0).to(tl.float32)[:, None]
        third *= tl.load(rate + 2 * C, mask=known, other=0.0).to(tl.float32)[:, None]
    tl.store(at, first.to(both.dtype.element_ty), mask=real)
    tl.store(at + F, third.to(both.dtype.element_ty), mask=real)
    tl.store(of_g, second.to(g.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["count", "C", "heads"])
def swiglu_second(
    left, right, lr, good, rates, count, C, heads, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """In place: left [count, 4F] = [P0 | P2 | a | u] becomes [lr0 ∂a | lr2 ∂u | gradient of a | of u], right
    [count, 2F] = [Q | g] becomes [lr1 hidden | gradient of g]. rates: [z, 3, C], gradient of lr. good: [z / heads].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    keep = (tl.load(good + row // C // heads, mask=known, other=0) != 0)[:, None]
    rate = (row // C) * 3 * C + row % C
    r0 = tl.load(lr + rate, mask=known, other=0.0).to(tl.float32)[:, None]
    r1 = tl.load(lr + rate + C, mask=known, other=0.0).to(tl.float32)[:, None]
    r2 = tl.load(lr + rate + 2 * C, mask=known, other=0.0).to(tl.float32)[:, None]
    of0 = tl.zeros([ROWS], tl.float32)
    of1 = tl.zeros([ROWS], tl.float32)
    of2 = tl.zeros([ROWS], tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = known[:, None] & (column < F)[None, :]
        at = left + row[:, None] * 4 * F + column[None, :]
        of = right + row[:, None] * 2 * F + column[None, :]
        p0 = tl.load(at, mask=real, other=0.0).to(tl.float32)
        p2 = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
        x = tl.load(at + 2 * F, mask=real, other=0.0).to(tl.float32)
        y = tl.load(at + 3 * F, mask=real, other=0.0).to(tl.float32)
        q = tl.load(of, mask=real, other=0.0).to(tl.float32)
        h = tl.load(of + F, mask=real, other=0.0).to(tl.float32)
        s = tl.sigmoid(x)
        silu = x * s
        slope = s + silu * (1 - s)
        curve = s * (1 - s) * (2 + x - 2 * silu)
        gx = (r2 * p2 * h + r1 * q * y) * slope + r0 * p0 * h * y * curve
        gy = r0 * p0 * h * slope + r1 * q * silu
        gh = r0 * p0 * y * slope + r2 * p2 * silu
        of0 += tl.sum(tl.where(keep, p0 * h * y * slope, 0.0), 1)
        of1 += tl.sum(tl.where(keep, q * y * silu, 0.0), 1)
        of2 += tl.sum(tl.where(keep, p2 * h * silu, 0.0), 1)
        tl.store(at, tl.where(keep, r0 * h * y * slope, 0.0).to(left.dtype.element_ty), mask=real)
        tl.store(at + F, tl.where(keep, r2 * h * silu, 0.0).to(left.dtype.element_ty), mask=real)
        tl.store(at + 2 * F, tl.where(keep, gx, 0.0).to(left.dtype.element_ty), mask=real)
        tl.store(at + 3 * F, tl.where(keep, gy, 0.0).to(left.dtype.element_ty), mask=real)
        tl.store(of, tl.where(keep, r1 * silu * y, 0.0).to(right.dtype.element_ty), mask=real)
        tl.store(of + F, tl.where(keep, gh, 0.0).to(right.dtype.element_ty), mask=real)
    tl.store(rates + rate, of0, mask=known)
    tl.store(rates + rate + C, of1, mask=known)
    tl.store(rates + rate + 2 * C, of2, mask=known)


@triton.jit(do_not_specialize=["count", "C", "heads"])
def hidden_second(
    both, asked, lr, good, rates, count, C, heads, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """In place: both = [a | u] becomes its gradient, asked [count, F] (of lr1 hidden, before the rate) lr1 hidden.
    lr: of w1 in [z, 3, C]. rates: [count], the gradient of lr1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    keep = (tl.load(good + row // C // heads, mask=known, other=0) != 0)[:, None]
    r = tl.load(lr + (row // C) * 3 * C + row % C, mask=known, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        real = known[:, None] & (column < F)[None, :]
        at = both + row[:, None] * 2 * F + column[None, :]
        of = asked + row[:, None] * F + column[None, :]
        x = tl.load(at, mask=real, other=0.0).to(tl.float32)
        y = tl.load(at + F, mask=real, other=0.0).to(tl.float32)
        q = tl.load(of, mask=real, other=0.0).to(tl.float32)
        s = tl.sigmoid(x)
        silu = x * s
        total += tl.sum(tl.where(keep, q * y * silu, 0.0), 1)
        tl.store(at, tl.where(keep, r * q * y * (s + silu * (1 - s)), 0.0).to(both.dtype.element_ty), mask=real)
        tl.store(at + F, tl.where(keep, r * q * silu, 0.0).to(both.dtype.element_ty), mask=real)
        tl.store(of, tl.where(keep, r * silu * y, 0.0).to(asked.dtype.element_ty), mask=real)
    tl.store(rates + row, total, mask=known)


@triton.jit
def move(
    inner, outer, momentum, beta, moved, energy, momentum_batch, inner_batch, outer_batch,
    CUT: tl.constexpr, SIZE: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """moved [batch, SIZE] = [inner | outer] + beta momentum; energy [batch, programs]: sums of its squares."""
    z = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(outer + z * outer_batch + i - CUT, mask=(i >= CUT) & (i < SIZE), other=0.0).to(tl.float32)
    if CUT:
        out += tl.load(inner + z * inner_batch + i, mask=i < CUT, other=0.0).to(tl.float32)
    if MOMENTUM:
        out += tl.load(beta + z) * tl.load(momentum + z * momentum_batch + i, mask=i < SIZE, other=0.0)
    tl.store(moved + z * SIZE + i, out, mask=i < SIZE)
    tl.store(energy + z * tl.num_programs(0) + tl.program_id(0), tl.sum(out * out))


@triton.jit
def move_rows(
    inner, outer, momentum, beta, base, moved, raw, norm, energy, momentum_batch, inner_batch, outer_batch, base_batch,
    CUT: tl.constexpr, SIZE: tl.constexpr, OFFSET: tl.constexpr, LENGTH: tl.constexpr, FIRST: tl.constexpr,
    NUMBER: tl.constexpr, ALL: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, MOMENTUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`move` and `add_rows` in one pass over NUMBER rows; energy [batch, PARTS], from the PART-th on."""
    z = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < NUMBER)[:, None] & (column < LENGTH)[None, :]
    at = OFFSET + row[:, None] * LENGTH + column[None, :]
    out = tl.load(outer + z * outer_batch + at - CUT, mask=real & (at >= CUT), other=0.0).to(tl.float32)
    if CUT:
        out += tl.load(inner + z * inner_batch + at, mask=real & (at < CUT), other=0.0).to(tl.float32)
    if MOMENTUM:
        out += tl.load(beta + z) * tl.load(momentum + z * momentum_batch + at, mask=real, other=0.0)
    tl.store(moved + z * SIZE + at, out, mask=real)
    tl.store(energy + z * PARTS + PART + tl.program_id(0), tl.sum(out * out))
    total = out + tl.load(base + z * base_batch + at, mask=real, other=0.0)
    tl.store(raw + z * SIZE + at, total, mask=real)
    tl.store(norm + z * ALL + FIRST + row, tl.sqrt(tl.sum(total * total, 1)), mask=row < NUMBER)


@triton.jit
def add_rows(
    stepped, base, raw, norm, base_batch, SIZE: tl.constexpr, OFFSET: tl.constexpr, LENGTH: tl.constexpr,
    FIRST: tl.constexpr, NUMBER: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """raw = stepped + base and the norms of its rows, for NUMBER rows of LENGTH elements from OFFSET on, of ALL rows
    the FIRST-th and following."""
    z = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real = (row < NUMBER)[:, None] & (column < LENGTH)[None, :]
    at = OFFSET + row[:, None] * LENGTH + column[None, :]
    total = tl.load(stepped + z * SIZE + at, mask=real, other=0.0).to(tl.float32)
    total += tl.load(base + z * base_batch + at, mask=real, other=0.0)
    tl.store(raw + z * SIZE + at, total, mask=real)
    tl.store(norm + z * ALL + FIRST + row, tl.sqrt(tl.sum(total * total, 1)), mask=row < NUMBER)


@triton.jit
def _row_of(i, CUT: tl.constexpr, D: tl.constexpr, F: tl.constexpr):
    """The row that flat element i lies in: rows of D elements below CUT, of F above."""
    return tl.where(i < CUT, i // D, CUT // D + (i - CUT) // F)


@triton.jit(do_not_specialize=["heads", "partial"])
def settle(
    old, momentum, accumulator, moved, raw, energy, norm, target, due, weights, low, good,
    old_batch, momentum_batch, accumulator_batch, low_batch, heads, partial,
    CUT: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ALL: tl.constexpr,
    MOMENTUM: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights, low = raw with rows scaled to target, if due and all sums are finite; else everything as it was.

    energy: [batch, partial]. norm, target: [batch, ALL]. due, good: [batch / heads].
    """
    z = tl.program_id(1).to(tl.int64)
    sequence = z // heads
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, heads * partial, BLOCK):
        at = k + tl.arange(0, BLOCK)
        total += tl.load(energy + sequence * heads * partial + at, mask=at < heads * partial, other=0.0)
    for k in range(0, heads * ALL, BLOCK):
        at = k + tl.arange(0, BLOCK)
        total += tl.load(norm + sequence * heads * ALL + at, mask=at < heads * ALL, other=0.0)
    # Sums of squares and norms: neither NaN nor infinite if they are below the largest number.
    happens = (tl.sum(total) < float("inf")) & (tl.load(due + sequence) != 0)
    if (tl.program_id(0) == 0) & (z % heads == 0):
        tl.store(good + sequence, happens.to(tl.uint8))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < SIZE
    row = _row_of(i, CUT, D, F)
    scale = tl.load(target + z * ALL + row, mask=real, other=0.0)
    scale = scale / (tl.load(norm + z * ALL + row, mask=real, other=1.0) + EPS)
    new = tl.load(raw + z * SIZE + i, mask=real, other=0.0) * scale
    if not happens:
        new = tl.load(old + z * old_batch + i, mask=real, other=0.0)
    tl.store(weights + z * SIZE + i, new, mask=real)
    tl.store(low + z * low_batch + i, new.to(low.dtype.element_ty), mask=real)
    if not happens:
        if MOMENTUM:
            tl.store(moved + z * SIZE + i, tl.load(momentum + z * momentum_batch + i, mask=real, other=0.0), mask=real)
        if ACCUMULATOR:
            kept = tl.load(accumulator + z * accumulator_batch + i, mask=real, other=0.0)
            tl.store(raw + z * SIZE + i, kept, mask=real)


@triton.jit(do_not_specialize=["heads"])
def unsettle(
    grad, raw, norm, target, accumulator, good, out, passed, now, of_target, grad_batch, now_batch, heads,
    SIZE: tl.constexpr, OFFSET: tl.constexpr, LENGTH: tl.constexpr, FIRST: tl.constexpr, NUMBER: tl.constexpr,
    ALL: tl.constexpr, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out: the gradient of the added direction, zero where the update did not happen. Adds the gradients of the weights
    before to now, of the target norms to of_target; passed: that of the accumulator before, with ACCUMULATOR."""
    z = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < NUMBER
    real = known[:, None] & (column < LENGTH)[None, :]
    at = OFFSET + row[:, None] * LENGTH + column[None, :]
    happened = tl.load(good + z // heads) != 0
    g = tl.load(grad + z * grad_batch + at, mask=real, other=0.0)
    w = tl.load(raw + z * SIZE + at, mask=real, other=0.0)
    n = tl.load(norm + z * ALL + FIRST + row, mask=known, other=1.0)
    t = tl.load(target + z * ALL + FIRST + row, mask=known, other=0.0)
    along = tl.sum(g * w, 1)
    inverse = 1 / (n + EPS)
    radial = tl.where(n > 0, along * t * inverse * inverse / n, 0.0)
    result = g * (t * inverse)[:, None] - w * radial[:, None]
    kept = g
    if ACCUMULATOR:
        later = tl.load(accumulator + z * SIZE + at, mask=real, other=0.0)
        result += later
        tl.store(passed + z * SIZE + at, tl.where(happened, result, later), mask=real)
        before = tl.where(happened, 0.0, kept)
    else:
        before = tl.where(happened, result, kept)
    tl.store(out + z * SIZE + at, tl.where(happened, result, 0.0), mask=real)
    total = tl.load(now + z * now_batch + at, mask=real, other=0.0)
    tl.store(now + z * now_batch + at, total + before, mask=real)
    norms = of_target + z * ALL + FIRST + row
    tl.store(norms, tl.load(norms, mask=known, other=0.0) + tl.where(happened, along * inverse, 0.0), mask=known)


@triton.jit(do_not_specialize=["heads"])
def unmove(
    grad, momentum, beta, before, good, direction, after, of_beta, momentum_batch, heads,
    SIZE: tl.constexpr, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the direction, of the momentum before (after) and, in parts [batch, programs], of beta. Only the
    first is rounded to the dtype of its tensor."""
    z = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < SIZE
    happened = tl.load(good + z // heads) != 0
    total = tl.load(grad + z * SIZE + i, mask=real, other=0.0).to(tl.float32)
    if MOMENTUM:
        passed = tl.load(momentum + z * momentum_batch + i, mask=real, other=0.0)
        total = tl.where(happened, total + passed, 0.0)
        tl.store(after + z * SIZE + i, tl.where(happened, tl.load(beta + z) * total, passed), mask=real)
        part = total * tl.load(before + z * SIZE + i, mask=real, other=0.0)
        tl.store(of_beta + z * tl.num_programs(0) + tl.program_id(0), tl.sum(part))
    tl.store(direction + z * SIZE + i, tl.where(happened, total, 0.0).to(direction.dtype.element_ty), mask=real)
