# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, forward: one program reads one sequence with one head (legend in kernels_shared.py; φ: tanh GELU).

Tiles of hidden units are turned, units × tokens, and so is W1: [C, D], as W2 lies. Then all large products take the
memory, or the gradients that move it, as their left factor with units as rows, and no warp needs another's units
but for the sums over units, z2 and the read. A memory that fits (BLOCK_C ≥ C) is held in registers from the
first mini-batch to the last; a larger one lies in the result's own buffers, which stay in the L2 cache, and passes
through the registers in blocks of units, twice per mini-batch. One mini-batch:
z1 = k W1 + b1, x = φ(z1), z2 = x W2 + b2 and from it P2 = r G(z2); E = P2 W2ᵀ, P1 = E ⊙ φ'(z1),
m1 = q W1 + b1 − τ T1 P1 − τ (q S1 + t1) with T1 = tril(q kᵀ + 1), a = φ(m1);
read = a W2 + b2 − τ T2 P2 − τ (a S2 + t2) with T2 = tril(a xᵀ + 1), y = q + LN(read);
W1' = W1 − τ_last (S1 + kᵀ P1), W2' = W2 − τ_last (S2 + xᵀ P2), where τ_last k and τ_last x are rounded for products.
(S, t) are the sums that came in with the call; they count in the first mini-batch only.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_shared import (
    causal,
    count_not_finite,
    gelu,
    inner_gradient,
    load_tile,
    load_vector,
    not_finite,
    rows_of,
    span_of,
    standardised,
    store_tile,
    store_vector,
)


@triton.jit
def block_at(index, column, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and masks of a block of hidden units in W1 [·, D, C], in W2 [·, C, D], and in b1 [·, C]."""
    d, j = tl.arange(0, BLOCK_D), column + tl.arange(0, BLOCK_C)
    start = index.to(tl.int64) * (D * C)
    at1, in1 = start + d[:, None] * C + j[None, :], (d < D)[:, None] & (j < C)[None, :]
    at2, in2 = start + j[:, None] * D + d[None, :], (j < C)[:, None] & (d < D)[None, :]
    return at1, in1, at2, in2, index.to(tl.int64) * C + j, j < C


@triton.jit
def load_block(
    memory, index, column, TURNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of hidden units of `memory` (pointers to W1, b1, W2, …) number `index`: turned W1, b1, W2, zero beyond.

    TURNED: W1 lies as [·, C, D], as it does between these kernels; else as the op has it, [·, D, C].
    """
    at1, in1, at2, in2, at_b, in_b = block_at(index, column, D, BLOCK_D, C, BLOCK_C)
    w1, b1, w2 = memory[0], memory[1], memory[2]
    if TURNED:
        first = tl.load(w1 + at2, mask=in2, other=0.0)
    else:
        first = tl.trans(tl.load(w1 + at1, mask=in1, other=0.0))
    return first, tl.load(b1 + at_b, mask=in_b, other=0.0), tl.load(w2 + at2, mask=in2, other=0.0)


@triton.jit
def store_block(
    memory, block, index, column, TURNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """block: turned W1, b1, W2 of the hidden units from `column` on."""
    at1, in1, at2, in2, at_b, in_b = block_at(index, column, D, BLOCK_D, C, BLOCK_C)
    w1, b1, w2 = memory[0], memory[1], memory[2]
    first, bias, second = block
    if TURNED:
        tl.store(w1 + at2, first.to(w1.dtype.element_ty), mask=in2)
    else:
        tl.store(w1 + at1, tl.trans(first), mask=in1)
    tl.store(b1 + at_b, bias, mask=in_b)
    tl.store(w2 + at2, second.to(w2.dtype.element_ty), mask=in2)


@triton.jit
def block_of(
    held, memory, index, column, TURNED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Turned W1, b1 and W2 of a block: what is held, if that is the whole memory, else loaded."""
    first, bias, second = held
    if BLOCK_C < C:
        first, bias, second = load_block(memory, index, column, TURNED, D, BLOCK_D, C, BLOCK_C)
    return first, bias, second


@triton.jit
def first_layer(x, first, bias, PRECISION: tl.constexpr):
    """x W1 + b1 for tokens x [tokens, D], turned: [units, tokens]."""
    return tl.dot(first.to(x.dtype), tl.trans(x), input_precision=PRECISION) + bias[:, None]


@triton.jit
def over_units(x, w, total, LOADED: tl.constexpr, PRECISION: tl.constexpr):
    """total + xᵀ w [tokens, D] for x [units, tokens] and w [units, D]. LOADED: w was loaded, not computed."""
    if LOADED:  # so all products read the one copy of w in shared memory
        total += tl.trans(tl.dot(tl.trans(w), x, input_precision=PRECISION))
    else:
        total = tl.dot(tl.trans(x), w, total, input_precision=PRECISION)
    return total


@triton.jit
def second_gradient(
    k, v, held, memory, index, bias2, eps, gamma, beta, TURNED: tl.constexpr, LOADED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """G(z2), unit and 1 / s."""
    z2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for column in range(0, C, BLOCK_C):
        first, bias, second = block_of(held, memory, index, column, TURNED, D, BLOCK_D, C, BLOCK_C)
        x = gelu(first_layer(k, first, bias, PRECISION))[0].to(k.dtype)
        z2 = over_units(x, second.to(k.dtype), z2, LOADED, PRECISION)
    unit, inverse = standardised(z2 + bias2[None, :], eps, D, BLOCK_D)
    gap = beta - (v.to(tl.float32) - k.to(tl.float32))
    return inner_gradient(unit, inverse, gap, gamma, D, BLOCK_D)[0], unit, inverse


@triton.jit
def writes_of(k, write2, first, bias, second, PRECISION: tl.constexpr):
    """Of a block, turned: x and P1 in the products' dtype, Σ P1 (not rounded), φ'(z1), φ''(z1), E."""
    x, slope, curve = gelu(first_layer(k, first, bias, PRECISION))
    error = tl.dot(second.to(k.dtype), tl.trans(write2), input_precision=PRECISION)
    wide1 = error * slope
    return x.to(k.dtype), wide1.to(k.dtype), tl.sum(wide1, 1), slope, curve, error


@triton.jit
def moved(k, write2, x, write1, total_b, block, step, PRECISION: tl.constexpr):
    """A block of the memory after a step of −τ_last, or 0, along these writes."""
    first, bias, second = block
    first = tl.dot(write1, (step * k.to(tl.float32)).to(k.dtype), first, input_precision=PRECISION)
    second = tl.dot((step * x.to(tl.float32)).to(k.dtype), write2, second, input_precision=PRECISION)
    return first, bias + step * total_b, second


@triton.jit
def moved_by(block, earlier, step):
    """`block` + step · `earlier`."""
    first, bias, second = block
    earlier1, earlier_b, earlier2 = earlier
    return first + step * earlier1, bias + step * earlier_b, second + step * earlier2


@triton.jit
def count_faults(block):
    first, bias, second = block
    return count_not_finite(first) + count_not_finite(bias) + count_not_finite(second)


@triton.jit
def _faulty_tokens(
    k, write2, held, memory, index,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Above 0 for tokens that would write something not finite into either layer."""
    reach = tl.maximum(tl.max(tl.abs(k.to(tl.float32)), 1), 1.0)[:, None]
    silent = not_finite(write2.to(tl.float32))
    for column in range(0, C, BLOCK_C):
        first, bias, second = block_of(held, memory, index, column, False, D, BLOCK_D, C, BLOCK_C)
        x, write1, _total, _slope, _curve, _error = writes_of(k, write2, first, bias, second, PRECISION)
        silent += not_finite(tl.trans(write1).to(tl.float32) * reach)
        silent += not_finite(write2.to(tl.float32) * tl.max(tl.abs(x.to(tl.float32)), 0)[:, None])
    return silent


@triton.jit
def _faulty_updates(
    k, write2, held, memory, sums, index, opening, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How many entries of W1', b1', W2' would not be finite. opening: whether S counts."""
    faults = 0
    for column in range(0, C, BLOCK_C):
        first, bias, second = block_of(held, memory, index, column, False, D, BLOCK_D, C, BLOCK_C)
        x, write1, total_b, _slope, _curve, _error = writes_of(k, write2, first, bias, second, PRECISION)
        first, bias, second = moved(k, write2, x, write1, total_b, (first, bias, second), -last, PRECISION)
        if opening:
            earlier = load_block(sums, index, column, False, D, BLOCK_D, C, BLOCK_C)
            first, bias, second = moved_by((first, bias, second), earlier, -last)
        faults += count_faults((first, bias, second))
    return faults


@triton.jit
def _mini_batch(
    c, held, bias2, faults, tokens, span, norm, memory, earlier, left, pid,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, GUARD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Read mini-batch c and learn from it: the memory after it, and the count of what is not finite in the sums.

    EDGE: c may be the first, with sums from before the call, or may be unfinished. Others are compiled without either.
    """
    q, k, v, rate, y, flags = tokens
    start, length, phase, h, H = span
    gamma, beta, taus, last, eps = norm
    i = tl.arange(0, BLOCK_K)
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    queries, keys = load_tile(q, rows, inside, D, BLOCK_D), load_tile(k, rows, inside, D, BLOCK_D)
    values = load_tile(v, rows, inside, D, BLOCK_D)
    rates = tl.load(rate + rows, mask=inside, other=0.0).to(tl.float32)
    opening, full = c == 0, (c + 1) * CHUNK <= phase + length
    if GUARD:
        silent = not_finite(keys.to(tl.float32)) + not_finite(values.to(tl.float32)) + not_finite(rates[:, None])
        keys = tl.where(silent[:, None] > 0, 0.0, keys).to(queries.dtype)
        values = tl.where(silent[:, None] > 0, 0.0, values).to(queries.dtype)
        rates = tl.where(silent > 0, 0.0, rates)
    grad2 = second_gradient(
        keys, values, held, memory, pid, bias2, eps, gamma, beta, False, False,
        D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION,
    )[0]  # fmt: skip
    wide2 = rates[:, None] * grad2
    write2 = wide2.to(queries.dtype)
    if GUARD:
        silent += _faulty_tokens(keys, write2, held, memory, pid, D, BLOCK_D, C, BLOCK_C, PRECISION)
        wide2 = tl.where(silent[:, None] > 0, 0.0, wide2)
        write2 = wide2.to(queries.dtype)
    bias_total = tl.sum(wide2, 0)
    if EDGE:
        bias_total += tl.where(opening, 1.0, 0.0) * load_vector(earlier[3], pid, D, BLOCK_D)
    applied = full
    if GUARD:
        bad = _faulty_updates(
            keys, write2, held, memory, earlier, pid, opening, last, D, BLOCK_D, C, BLOCK_C, PRECISION
        )  # fmt: skip
        applied = full & (bad + count_not_finite(bias2 - last * bias_total) == 0)
        flag = tl.where(silent > 0, 1, 0) + tl.where((i == CHUNK - 1) & full & (applied == 0), 2, 0)
        tl.store(flags + rows, flag.to(tl.int8), mask=inside)
    step = tl.where(applied, -last, 0.0)
    scores = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K) * -taus[:, None]
    scores = scores.to(queries.dtype)
    mixed = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    read = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    first, bias1, second = held
    for column in range(0, C, BLOCK_C):
        one, bias, two = block_of((first, bias1, second), memory, pid, column, False, D, BLOCK_D, C, BLOCK_C)
        middle = first_layer(queries, one, bias, PRECISION)
        x, write1, total_b, _slope, _curve, _error = writes_of(keys, write2, one, bias, two, PRECISION)
        middle = tl.dot(write1, tl.trans(scores), middle, input_precision=PRECISION)
        if EDGE and opening:
            s_first, s_bias, s_second = load_block(earlier, pid, column, False, D, BLOCK_D, C, BLOCK_C)
            middle -= taus[None, :] * first_layer(queries, s_first, s_bias, PRECISION)
        active = gelu(middle)[0].to(queries.dtype)
        mixed = tl.dot(tl.trans(active), x, mixed, input_precision=PRECISION)
        read = tl.dot(tl.trans(active), two.to(queries.dtype), read, input_precision=PRECISION)
        if EDGE and full == 0:
            total1 = tl.dot(write1, keys, input_precision=PRECISION)
            total2 = tl.dot(x, write2, input_precision=PRECISION)
            if opening:
                before = load_block(earlier, pid, column, False, D, BLOCK_D, C, BLOCK_C)
                total1, total_b, total2 = moved_by((total1, total_b, total2), before, 1.0)
            store_block(left, (total1, total_b, total2), pid, column, False, D, BLOCK_D, C, BLOCK_C)
            faults += count_faults((total1, total_b, total2))
        one, bias, two = moved(keys, write2, x, write1, total_b, (one, bias, two), step, PRECISION)
        if EDGE and opening:
            s_first, s_bias, s_second = load_block(earlier, pid, column, False, D, BLOCK_D, C, BLOCK_C)
            product = tl.dot(tl.trans(active), s_second.to(queries.dtype), input_precision=PRECISION)
            read -= taus[:, None] * product
            if applied:
                one, bias, two = moved_by((one, bias, two), (s_first, s_bias, s_second), step)
        if BLOCK_C >= C:
            first, bias1, second = one, bias, two
        elif applied:
            store_block(memory, (one, bias, two), pid, column, False, D, BLOCK_D, C, BLOCK_C)
    mixed = (causal(mixed + 1.0, BLOCK_K) * -taus[:, None]).to(queries.dtype)
    read = tl.dot(mixed, write2, read, input_precision=PRECISION) + bias2[None, :]
    if EDGE:
        read -= tl.where(opening, taus, 0.0)[:, None] * load_vector(earlier[3], pid, D, BLOCK_D)[None, :]
    unit = standardised(read, eps, D, BLOCK_D)[0]
    store_tile(y, queries.to(tl.float32) + unit * gamma + beta, rows, inside, D, BLOCK_D)
    if EDGE and full == 0:
        store_vector(left[3], bias_total, pid, D, BLOCK_D)
        faults += count_not_finite(bias_total)
    bias2 = tl.where(applied, bias2 - last * bias_total, bias2)
    if BLOCK_C < C:
        tl.debug_barrier()  # the next mini-batch reads what other threads have stored
    return first, bias1, second, bias2, faults


@triton.jit(do_not_specialize=["num_tokens", "packed", "keep"])
def mlp_forward(
    q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position, cu_seqlens,
    y, w1_out, b1_out, w2_out, b2_out, s1_out, t1_out, s2_out, t2_out, flags, suspects,
    kept_w1, kept_b1, kept_w2, kept_b2, num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, keep, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Arguments as in `linear_forward`, with four parts of a memory for its two.

    kept_w1: turned, [slots, H, C, D].
    """
    pid = tl.program_id(0)
    if GUARD and tl.load(suspects + pid) == 0:
        return
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    memory, kept, given = (w1_out, b1_out, w2_out), (kept_w1, kept_b1, kept_w2), (w1, b1, w2)
    earlier, left = (s1, t1, s2, t2), (s1_out, t1_out, s2_out, t2_out)
    tokens, span, norm = (q, k, v, rate, y, flags), (start, length, phase, h, H), (gamma, beta, taus, last, eps)
    first, bias1, second = load_block(given, pid, 0, False, D, BLOCK_D, C, BLOCK_C)
    bias2 = load_vector(b2, pid, D, BLOCK_D)
    if BLOCK_C < C:
        for column in range(0, C, BLOCK_C):
            initial = load_block(given, pid, column, False, D, BLOCK_D, C, BLOCK_C)
            store_block(memory, initial, pid, column, False, D, BLOCK_D, C, BLOCK_C)
        tl.debug_barrier()
    faults = 0
    slot = start // (CHUNK * EVERY) + 2 * n
    whole, chunks = (phase + length) // CHUNK, (phase + length + CHUNK - 1) // CHUNK
    stretches = (chunks + EVERY - 1) // EVERY
    # Mini-batches 0 and `whole` are edges; they have places of their own, so that the loop between has no branches.
    for s in range(stretches + 1):
        if (keep > 0) & (s < stretches):
            index = (slot + s) * H + h
            for column in range(0, C, BLOCK_C):
                now = block_of((first, bias1, second), memory, pid, column, False, D, BLOCK_D, C, BLOCK_C)
                store_block(kept, now, index, column, True, D, BLOCK_D, C, BLOCK_C)
            store_vector(kept_b2, bias2, index, D, BLOCK_D)
        edge = tl.where(s == 0, 0, tl.where(s == stretches, tl.maximum(whole, 1), chunks))
        for c in range(edge, tl.minimum(edge + 1, chunks)):
            first, bias1, second, bias2, faults = _mini_batch(
                c, (first, bias1, second), bias2, faults, tokens, span, norm, memory, earlier, left, pid,
                D, BLOCK_D, C, BLOCK_C, CHUNK, BLOCK_K, PRECISION, GUARD, True,
            )  # fmt: skip
        for c in range(tl.maximum(s * EVERY, 1), tl.minimum((s + 1) * EVERY, whole)):
            first, bias1, second, bias2, faults = _mini_batch(
                c, (first, bias1, second), bias2, faults, tokens, span, norm, memory, earlier, left, pid,
                D, BLOCK_D, C, BLOCK_C, CHUNK, BLOCK_K, PRECISION, GUARD, False,
            )  # fmt: skip
    store_vector(b2_out, bias2, pid, D, BLOCK_D)
    done = (phase + length) % CHUNK == 0
    if done:
        store_vector(t2_out, tl.zeros_like(bias2), pid, D, BLOCK_D)
    faults += count_not_finite(bias2)
    for column in range(0, C, BLOCK_C):
        one, bias, two = block_of((first, bias1, second), memory, pid, column, False, D, BLOCK_D, C, BLOCK_C)
        faults += count_faults((one, bias, two))
        if BLOCK_C >= C:
            store_block(memory, (one, bias, two), pid, column, False, D, BLOCK_D, C, BLOCK_C)
        if done:
            nothing = (tl.zeros_like(one), tl.zeros_like(bias), tl.zeros_like(two))
            store_block(left, nothing, pid, column, False, D, BLOCK_D, C, BLOCK_C)
    if GUARD == 0:
        tl.store(suspects + pid, faults)
