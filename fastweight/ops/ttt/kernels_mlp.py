# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, forward: one program reads one sequence with one head.

Its memory W1, b1, W2, b2 (128 KiB at D 64) lies in the result's own buffers, which stay in the L2 cache, and passes
through the registers in blocks of hidden units, twice per mini-batch (legend in kernels_shared.py; φ is the tanh GELU):
first z1 = k W1 + b1, x = φ(z1), z2 = x W2 + b2 and from it P2 = r G(z2); then, block by block,
E = P2 W2ᵀ, P1 = E ⊙ φ'(z1), m1 = q W1 + b1 − τ T1 P1 − τ (q S1 + t1) with T1 = tril(q kᵀ + 1), a = φ(m1),
and the sums a xᵀ and a W2, while W1' = W1 − τ_last (S1 + kᵀ P1) and W2' = W2 − τ_last (S2 + xᵀ P2) take their places;
last read = a W2 + b2 − τ T2 P2 − τ (a S2 + t2) with T2 = tril(a xᵀ + 1), and y = q + LN(read).
(S, t) are the sums that came in with the call; they count in the first mini-batch only.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_shared import (
    causal,
    count_not_finite,
    gelu,
    inner_gradient,
    load_learning,
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
def hidden(k, w1, b1, at, in1, at_b, in_b, PRECISION: tl.constexpr):
    """z1, W1 and b1 of one block of hidden units. at, in1, at_b, in_b: the block's offsets and masks."""
    w = tl.load(w1 + at, mask=in1, other=0.0)
    bias = tl.load(b1 + at_b, mask=in_b, other=0.0)
    return tl.dot(k, w.to(k.dtype), input_precision=PRECISION) + bias[None, :], w, bias


@triton.jit
def block_at(index, column, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and masks of a block of hidden units in W1 [·, D, C], in W2 [·, C, D], and in b1 [·, C]."""
    d, j = tl.arange(0, BLOCK_D), column + tl.arange(0, BLOCK_C)
    start = index.to(tl.int64) * (D * C)
    at1, in1 = start + d[:, None] * C + j[None, :], (d < D)[:, None] & (j < C)[None, :]
    at2, in2 = start + j[:, None] * D + d[None, :], (j < C)[:, None] & (d < D)[None, :]
    return at1, in1, at2, in2, index.to(tl.int64) * C + j, j < C


@triton.jit
def second_gradient(
    k, v, w1, b1, w2, bias2, index, eps, gamma, beta,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z2 and G(z2) under memory number `index`."""
    z2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(index, column, D, BLOCK_D, C, BLOCK_C)
        z1 = hidden(k, w1, b1, at1, in1, at_b, in_b, PRECISION)[0]
        x = gelu(z1)[0].to(k.dtype)
        z2 += tl.dot(x, tl.load(w2 + at2, mask=in2, other=0.0).to(k.dtype), input_precision=PRECISION)
    z2 += bias2[None, :]
    unit, inverse = standardised(z2, eps, D, BLOCK_D)
    gap = beta - (v.to(tl.float32) - k.to(tl.float32))
    return z2, inner_gradient(unit, inverse, gap, gamma, D, BLOCK_D)[0]


@triton.jit
def _faulty_tokens(
    k, write2, w1, b1, w2, index,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Above 0 for tokens that would write something not finite into either layer."""
    reach = tl.maximum(tl.max(tl.abs(k.to(tl.float32)), 1), 1.0)[:, None]
    silent = not_finite(write2.to(tl.float32))
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(index, column, D, BLOCK_D, C, BLOCK_C)
        x, slope, _curve = gelu(hidden(k, w1, b1, at1, in1, at_b, in_b, PRECISION)[0])
        w = tl.load(w2 + at2, mask=in2, other=0.0).to(k.dtype)
        write1 = (tl.dot(write2, tl.trans(w), input_precision=PRECISION) * slope).to(k.dtype)
        silent += not_finite(write1.to(tl.float32) * reach)
        silent += not_finite(write2.to(tl.float32) * tl.max(tl.abs(x), 1)[:, None])
    return silent


@triton.jit
def _faulty_updates(
    k, write2, w1, b1, w2, s1, t1, s2, index, opening, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """How many entries of W1', b1', W2' would not be finite. opening: whether S counts."""
    faults = 0
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(index, column, D, BLOCK_D, C, BLOCK_C)
        z1, w, bias = hidden(k, w1, b1, at1, in1, at_b, in_b, PRECISION)
        x, slope, _curve = gelu(z1)
        second = tl.load(w2 + at2, mask=in2, other=0.0)
        error = tl.dot(write2, tl.trans(second).to(k.dtype), input_precision=PRECISION)
        write1 = (error * slope).to(k.dtype)
        total1 = tl.dot(tl.trans(k), write1, input_precision=PRECISION)
        total1 += tl.load(s1 + at1, mask=in1 & opening, other=0.0)
        bias1 = tl.sum(write1.to(tl.float32), 0) + tl.load(t1 + at_b, mask=in_b & opening, other=0.0)
        total2 = tl.dot(tl.trans(x.to(k.dtype)), write2, input_precision=PRECISION)
        total2 += tl.load(s2 + at2, mask=in2 & opening, other=0.0)
        faults += count_not_finite(w - last * total1) + count_not_finite(second - last * total2)
        faults += count_not_finite(bias - last * bias1)
    return faults


@triton.jit
def copy_memory(
    w1, b1, w2, source, to_w1, to_b1, to_w2, target,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Memory number `source` of the first buffers into number `target` of the others; all threads see it after."""
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(source, column, D, BLOCK_D, C, BLOCK_C)
        to1, _1, to2, _2, to_b, _b = block_at(target, column, D, BLOCK_D, C, BLOCK_C)
        tl.store(to_w1 + to1, tl.load(w1 + at1, mask=in1), mask=in1)
        tl.store(to_w2 + to2, tl.load(w2 + at2, mask=in2), mask=in2)
        tl.store(to_b1 + to_b, tl.load(b1 + at_b, mask=in_b), mask=in_b)
    tl.debug_barrier()


@triton.jit
def mini_batch(
    c, bias2, faults, tokens, span, norm, memory, sums, left, kept, slot, keep,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr, EVERY: tl.constexpr, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Read mini-batch c and learn from it: b2 after it, and `faults` with what is not finite in the sums left behind.

    memory: pointers to W1, b1, W2, in place; sums, left: to S and to where an unfinished mini-batch leaves them; kept:
    to the states kept, the first at `slot`.
    """
    q, k, v, rate, y, flags = tokens
    start, length, phase, pid, h, H = span
    gamma, beta, taus, last, eps = norm
    w1_out, b1_out, w2_out = memory
    s1, t1, s2, t2 = sums
    s1_out, t1_out, s2_out, t2_out = left
    kept_w1, kept_b1, kept_w2, kept_b2 = kept
    i = tl.arange(0, BLOCK_K)
    if (keep > 0) & (c % EVERY == 0):
        index = (slot + c // EVERY) * H + h
        copy_memory(w1_out, b1_out, w2_out, pid, kept_w1, kept_b1, kept_w2, index, D, BLOCK_D, C, BLOCK_C)
        store_vector(kept_b2, bias2, index, D, BLOCK_D)
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
        keys, values, w1_out, b1_out, w2_out, bias2, pid, eps, gamma, beta, D, BLOCK_D, C, BLOCK_C, BLOCK_K,
        PRECISION,
    )[1]  # fmt: skip
    wide2 = rates[:, None] * grad2  # biases sum what is not rounded
    write2 = wide2.to(queries.dtype)
    applied = full
    if GUARD:
        silent += _faulty_tokens(
            keys, write2, w1_out, b1_out, w2_out, pid, D, BLOCK_D, C, BLOCK_C, PRECISION
        )  # fmt: skip
        wide2 = tl.where(silent[:, None] > 0, 0.0, wide2)
        write2 = wide2.to(queries.dtype)
    bias_total = tl.sum(wide2, 0) + tl.where(opening, 1.0, 0.0) * load_vector(t2, pid, D, BLOCK_D)
    new_bias2 = tl.where(full, bias2 - last * bias_total, bias2)
    if GUARD:
        bad = _faulty_updates(
            keys, write2, w1_out, b1_out, w2_out, s1, t1, s2, pid, opening, last, D, BLOCK_D, C, BLOCK_C, PRECISION
        )  # fmt: skip
        applied = full & (bad + count_not_finite(new_bias2) == 0)
        new_bias2 = tl.where(applied, new_bias2, bias2)
        flag = tl.where(silent > 0, 1, 0) + tl.where((i == CHUNK - 1) & full & (applied == 0), 2, 0)
        tl.store(flags + rows, flag.to(flags.dtype.element_ty), mask=inside)
    scores = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K) * taus
    scores = scores.to(queries.dtype)
    mixed = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    read = tl.zeros([BLOCK_K, BLOCK_D], tl.float32) + bias2[None, :]
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        z1, first, bias1 = hidden(keys, w1_out, b1_out, at1, in1, at_b, in_b, PRECISION)
        second = tl.load(w2_out + at2, mask=in2, other=0.0)
        x, slope, _curve = gelu(z1)
        x = x.to(queries.dtype)
        error = tl.dot(write2, tl.trans(second.to(queries.dtype)), input_precision=PRECISION)
        wide1 = error * slope
        write1 = wide1.to(queries.dtype)
        middle = tl.dot(queries, first.to(queries.dtype), input_precision=PRECISION) + bias1[None, :]
        middle -= tl.dot(scores, write1, input_precision=PRECISION)
        total1 = tl.dot(tl.trans(keys), write1, input_precision=PRECISION)
        total2 = tl.dot(tl.trans(x), write2, input_precision=PRECISION)
        total_b = tl.sum(wide1, 0)
        if opening:
            earlier1 = tl.load(s1 + at1, mask=in1, other=0.0)
            earlier_b = tl.load(t1 + at_b, mask=in_b, other=0.0)
            before = tl.dot(queries, earlier1.to(queries.dtype), input_precision=PRECISION)
            middle -= taus * (before + earlier_b[None, :])
            total1 += earlier1
            total_b += earlier_b
        active = gelu(middle)[0].to(queries.dtype)
        mixed += tl.dot(active, tl.trans(x), input_precision=PRECISION)
        read += tl.dot(active, second.to(queries.dtype), input_precision=PRECISION)
        if opening:
            earlier2 = tl.load(s2 + at2, mask=in2, other=0.0)
            read -= taus * tl.dot(active, earlier2.to(queries.dtype), input_precision=PRECISION)
            total2 += earlier2
        if full == 0:
            tl.store(s1_out + at1, total1, mask=in1)
            tl.store(t1_out + at_b, total_b, mask=in_b)
            tl.store(s2_out + at2, total2, mask=in2)
            faults += count_not_finite(total1) + count_not_finite(total_b) + count_not_finite(total2)
        if applied:
            tl.store(w1_out + at1, first - last * total1, mask=in1)
            tl.store(b1_out + at_b, bias1 - last * total_b, mask=in_b)
            tl.store(w2_out + at2, second - last * total2, mask=in2)
    mixed = (causal(mixed + 1.0, BLOCK_K) * taus).to(queries.dtype)
    read -= tl.dot(mixed, write2, input_precision=PRECISION)
    if opening:
        read -= taus * load_vector(t2, pid, D, BLOCK_D)[None, :]
    if full == 0:
        store_vector(t2_out, bias_total, pid, D, BLOCK_D)
        faults += count_not_finite(bias_total)
    unit = standardised(read, eps, D, BLOCK_D)[0]
    store_tile(y, queries.to(tl.float32) + unit * gamma + beta, rows, inside, D, BLOCK_D)
    tl.debug_barrier()  # the next mini-batch reads what other threads have stored
    return new_bias2, faults


@triton.jit
def finish(
    memory, bias2, left, pid, done, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """How many entries of the memory are not finite; sums of zero where the last mini-batch is done."""
    w1_out, b1_out, w2_out = memory
    s1_out, t1_out, s2_out, t2_out = left
    faults = count_not_finite(bias2)
    if done:
        store_vector(t2_out, tl.zeros_like(bias2), pid, D, BLOCK_D)
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        if done:
            tl.store(s1_out + at1, tl.zeros([BLOCK_D, BLOCK_C], tl.float32), mask=in1)
            tl.store(t1_out + at_b, tl.zeros([BLOCK_C], tl.float32), mask=in_b)
            tl.store(s2_out + at2, tl.zeros([BLOCK_C, BLOCK_D], tl.float32), mask=in2)
        faults += count_not_finite(tl.load(w1_out + at1, mask=in1, other=0.0))
        faults += count_not_finite(tl.load(b1_out + at_b, mask=in_b, other=0.0))
        faults += count_not_finite(tl.load(w2_out + at2, mask=in2, other=0.0))
    return faults


@triton.jit(do_not_specialize=["num_tokens", "packed", "keep"])
def mlp_forward(
    q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position, cu_seqlens,
    y, w1_out, b1_out, w2_out, b2_out, s1_out, t1_out, s2_out, t2_out, flags, suspects,
    kept_w1, kept_b1, kept_w2, kept_b2, num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, keep, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Arguments as in `linear_forward`, with four parts of a memory for its two."""
    pid = tl.program_id(0)
    if GUARD and tl.load(suspects + pid) == 0:
        return
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    slot = start // (CHUNK * EVERY) + 2 * n
    tokens, span, norm = (q, k, v, rate, y, flags), (start, length, phase, pid, h, H), (gamma, beta, taus, last, eps)
    memory, kept = (w1_out, b1_out, w2_out), (kept_w1, kept_b1, kept_w2, kept_b2)
    sums, left = (s1, t1, s2, t2), (s1_out, t1_out, s2_out, t2_out)
    copy_memory(w1, b1, w2, pid, w1_out, b1_out, w2_out, pid, D, BLOCK_D, C, BLOCK_C)
    bias2, faults = load_vector(b2, pid, D, BLOCK_D), 0
    for c in range((phase + length + CHUNK - 1) // CHUNK):
        bias2, faults = mini_batch(
            c, bias2, faults, tokens, span, norm, memory, sums, left, kept, slot, keep,
            D, BLOCK_D, C, BLOCK_C, CHUNK, BLOCK_K, EVERY, PRECISION, GUARD,
        )  # fmt: skip
    store_vector(b2_out, bias2, pid, D, BLOCK_D)
    faults += finish(memory, bias2, left, pid, (phase + length) % CHUNK == 0, D, BLOCK_D, C, BLOCK_C)
    if GUARD == 0:
        tl.store(suspects + pid, faults)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_replay(
    k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags,
    kept_w1, kept_b1, kept_w2, kept_b2, owner, base, all_w1, all_b1, all_w2, all_b2,
    num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (stretches, heads). As `linear_replay`; all_w1 … all_b2 [stretches · EVERY, H, …] in float32."""
    stretch, h = tl.program_id(0), tl.program_id(1)
    n = tl.load(owner + stretch)
    if n >= num_sequences:
        return
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    begin = first + (stretch - tl.load(base + n)) * EVERY
    end = tl.minimum(begin + EVERY, (phase + length + CHUNK - 1) // CHUNK)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    index, pid = (start // (CHUNK * EVERY) + 2 * n + begin // EVERY) * H + h, n * H + h
    place = (stretch * EVERY).to(tl.int64) * H + h
    copy_memory(kept_w1, kept_b1, kept_w2, index, all_w1, all_b1, all_w2, place, D, BLOCK_D, C, BLOCK_C)
    bias2 = load_vector(kept_b2, index, D, BLOCK_D)
    for c in range(begin, end):
        store_vector(all_b2, bias2, place, D, BLOCK_D)
        if c + 1 < end:
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
            grad2 = second_gradient(
                keys, values, all_w1, all_b1, all_w2, bias2, place, eps, gamma, beta, D, BLOCK_D, C, BLOCK_C, BLOCK_K,
                PRECISION,
            )[1]  # fmt: skip
            wide2 = rates[:, None] * grad2
            write2, total = wide2.to(keys.dtype), tl.sum(wide2, 0)
            if c == 0:
                total += load_vector(t2, pid, D, BLOCK_D)
            bias2 = tl.where(refused, bias2, bias2 - last * total)
            for column in range(0, C, BLOCK_C):
                at1, in1, at2, in2, at_b, in_b = block_at(place, column, D, BLOCK_D, C, BLOCK_C)
                z1, one, bias1 = hidden(keys, all_w1, all_b1, at1, in1, at_b, in_b, PRECISION)
                two = tl.load(all_w2 + at2, mask=in2, other=0.0)
                x, slope, _curve = gelu(z1)
                error = tl.dot(write2, tl.trans(two.to(keys.dtype)), input_precision=PRECISION)
                wide1 = error * slope
                write1 = wide1.to(keys.dtype)
                total1 = tl.dot(tl.trans(keys), write1, input_precision=PRECISION)
                total2 = tl.dot(tl.trans(x.to(keys.dtype)), write2, input_precision=PRECISION)
                total_b = tl.sum(wide1, 0)
                if c == 0:
                    in_s1, _1, in_s2, _2, in_t1, _b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
                    total1 += tl.load(s1 + in_s1, mask=in1, other=0.0)
                    total2 += tl.load(s2 + in_s2, mask=in2, other=0.0)
                    total_b += tl.load(t1 + in_t1, mask=in_b, other=0.0)
                tl.store(all_w1 + at1 + H * D * C, tl.where(refused, one, one - last * total1), mask=in1)
                tl.store(all_w2 + at2 + H * D * C, tl.where(refused, two, two - last * total2), mask=in2)
                tl.store(all_b1 + at_b + H * C, tl.where(refused, bias1, bias1 - last * total_b), mask=in_b)
            tl.debug_barrier()
        place += H
