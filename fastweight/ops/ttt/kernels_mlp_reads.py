# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, backward: what is done for many mini-batches side by side (names as in kernels_mlp.py).

`mlp_replay`, one program per stretch and head: from kept states to W1 … b2 of every mini-batch.
`mlp_reads`, one program per mini-batch and head: what does not need the memory's gradient.
d read through LN; dT2 = −τ tril(d read P2ᵀ); dP2 = −(τ T2)ᵀ d read; block by block
da = d read W2ᵀ + dT2 x − τ d read S2ᵀ, dx = dT2ᵀ a, dm = da ⊙ φ'(m1), dP1 = −(τ T1)ᵀ dm, dT1 = −τ tril(dm P1ᵀ);
dq = dy + dm W1ᵀ + dT1 k − τ dm S1ᵀ; dk = dT1ᵀ q; dS1 = −(τ q)ᵀ dm, dS2 = −(τ a)ᵀ d read;
dτ = −Σ_j (tril(dm P1ᵀ) T1 + tril(d read P2ᵀ) T2) − Σ dm (q S1 + t1) − Σ d read (a S2 + t2).
`mlp_keys`, after `mlp_backward` (kernels_mlp_backward.py), the same grid: dk += dz1 W1ᵀ.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp import (
    block_of,
    first_layer,
    load_block,
    moved,
    moved_by,
    over_units,
    second_gradient,
    store_block,
    writes_of,
)
from fastweight.ops.ttt.kernels_shared import (
    causal,
    gelu,
    load_learning,
    load_tile,
    load_vector,
    norm_backward,
    rows_of,
    span_of,
    standardised,
    store_tile,
    store_vector,
)


@triton.jit
def turned_at(
    place, column, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Offsets and mask of a block of hidden units in a turned tile [·, C, CHUNK]."""
    j, i = column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    return place.to(tl.int64) * (C * CHUNK) + j[:, None] * CHUNK + i[None, :], (j < C)[:, None] & (i < CHUNK)[None, :]


@triton.jit
def second_layer(
    w2, place, column, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """A block [BLOCK_C, BLOCK_D] of W2, or of W1 turned, of a place."""
    j, d = column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    at = place.to(tl.int64) * (D * C) + j[:, None] * D + d[None, :]
    return tl.load(w2 + at, mask=(j < C)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_replay(
    k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags,
    kept_w1, kept_b1, kept_w2, kept_b2, owner, base, all_w1, all_b1, all_w2, all_b2, run_w1, run_b1, run_w2,
    num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (stretches, heads). As `linear_replay`: all_w1 (turned), all_w2 [stretches · EVERY, H, C, D] in q's dtype.

    all_b1, all_b2: float32. run_w1 …: [stretches, H, …] float32, where a memory that is not held changes.
    """
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
    kept, running, replayed = (kept_w1, kept_b1, kept_w2), (run_w1, run_b1, run_w2), (all_w1, all_b1, all_w2)
    own = stretch * H + h
    first1, bias1, second = load_block(kept, index, 0, True, D, BLOCK_D, C, BLOCK_C)
    bias2 = load_vector(kept_b2, index, D, BLOCK_D)
    if BLOCK_C < C:
        for column in range(0, C, BLOCK_C):
            initial = load_block(kept, index, column, True, D, BLOCK_D, C, BLOCK_C)
            store_block(running, initial, own, column, True, D, BLOCK_D, C, BLOCK_C)
        tl.debug_barrier()
    for piece in range(2):  # the sums that came in with the call count after mini-batch 0, between the two
        for c in range(
            tl.where(piece == 0, begin, tl.maximum(begin, 1)), tl.where(piece == 0, tl.minimum(end, 1), end)
        ):
            place = (stretch * EVERY + c - begin) * H + h
            store_vector(all_b2, bias2, place, D, BLOCK_D)
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            keys, values, rates, _kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
            step = tl.where(refused, 0.0, -last)
            grad2 = second_gradient(
                keys, values, (first1, bias1, second), running, own, bias2, eps, gamma, beta, True, False,
                D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION,
            )[0]  # fmt: skip
            wide2 = rates[:, None] * grad2
            write2 = wide2.to(keys.dtype)
            bias2 += step * tl.sum(wide2, 0)
            for column in range(0, C, BLOCK_C):
                one, bias, two = block_of((first1, bias1, second), running, own, column, True, D, BLOCK_D, C, BLOCK_C)
                store_block(replayed, (one, bias, two), place, column, True, D, BLOCK_D, C, BLOCK_C)
                x, write1, total_b, _slope, _curve, _error = writes_of(keys, write2, one, bias, two, PRECISION)
                one, bias, two = moved(keys, write2, x, write1, total_b, (one, bias, two), step, PRECISION)
                if BLOCK_C >= C:
                    first1, bias1, second = one, bias, two
                else:
                    store_block(running, (one, bias, two), own, column, True, D, BLOCK_D, C, BLOCK_C)
            if BLOCK_C < C:
                tl.debug_barrier()
        if (piece == 0) & (begin == 0):
            rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
            if tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) <= 1:
                bias2 -= last * load_vector(t2, pid, D, BLOCK_D)
                for column in range(0, C, BLOCK_C):
                    one, bias, two = block_of(
                        (first1, bias1, second), running, own, column, True, D, BLOCK_D, C, BLOCK_C
                    )  # fmt: skip
                    earlier = load_block((s1, t1, s2), pid, column, False, D, BLOCK_D, C, BLOCK_C)
                    one, bias, two = moved_by((one, bias, two), earlier, -last)
                    if BLOCK_C >= C:
                        first1, bias1, second = one, bias, two
                    else:
                        store_block(running, (one, bias, two), own, column, True, D, BLOCK_D, C, BLOCK_C)
                if BLOCK_C < C:
                    tl.debug_barrier()


@triton.jit
def _place(at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed):
    """Of place `at`: its sequence n, mini-batch c, start, length, phase, and whether there is such a mini-batch."""
    n = tl.load(owner + at // EVERY)
    there = n < num_sequences
    n = tl.where(there, n, 0)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    c = first + (at // EVERY - tl.load(base + n)) * EVERY + at % EVERY
    return n, c, start, length, phase, there & (c * CHUNK < phase + length)


@triton.jit
def _middle(
    q, scores, write1, first, bias, sums, pid, column, taus,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """m1 and q S1 + t1 of a block, turned. scores: −τ T1."""
    middle = first_layer(q, first, bias, PRECISION)
    middle = tl.dot(write1, tl.trans(scores), middle, input_precision=PRECISION)
    before = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    if OPENING:
        s_first, s_bias, _second = load_block(sums, pid, column, False, D, BLOCK_D, C, BLOCK_C)
        before = first_layer(q, s_first, s_bias, PRECISION)
        middle -= taus[None, :] * before
    return middle, before


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_reads(
    dy, q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, owner, base,
    all_w1, all_b1, all_w2, all_b2, units, grads2, d_writes2, d_keys, d_reads, inverses,
    xs, slopes, bends, writes1, actives, d_middles, d_hiddens, d_writes1,
    dq, dtau, dgamma, dbeta, ds1, dt1, ds2, dt2, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
    OPENING: tl.constexpr,
):  # fmt: skip
    """Grid: (places, heads), a place being one mini-batch: stretches · EVERY of them (see `linear_replay`).

    OPENING: (sequences, heads) and only the first mini-batch of each sequence, else all but those.

    Written per place and head: units, grads2, d_writes2, d_keys [·, CHUNK, D] float32, d_reads in q's dtype;
    inverses (1 / s) [·, CHUNK]; turned, in q's dtype, [·, C, CHUNK]: x, φ'(z1), E ⊙ φ''(z1), P1,
    a, dm, and the parts of dx and dP1; dtau [·, CHUNK], dgamma, dbeta [·, D]; dq for the tokens; OPENING:
    ds1 …, too.
    """
    at, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    if OPENING:
        at = tl.load(base + at) * EVERY
    n, c, start, length, phase, there = _place(
        at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed
    )  # fmt: skip
    if OPENING:
        there = there & (n == tl.program_id(0))
    if (there == 0) | ((c == 0) != OPENING):
        return
    place, pid = at.to(tl.int64) * H + h, n * H + h
    memory, sums = (all_w1, all_b1, all_w2), (s1, t1, s2)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    tau_row = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)
    taus = tau_row[:, None]
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
    queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D).to(tl.float32)
    own, here = place * CHUNK + i, i < CHUNK
    bias2 = load_vector(all_b2, place, D, BLOCK_D)
    held = load_block(memory, place, 0, True, D, BLOCK_D, C, BLOCK_C)
    grad2, inner_unit, inner_inverse = second_gradient(
        keys, values, held, memory, place, bias2, eps, gamma, beta, True, True,
        D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION,
    )  # fmt: skip
    store_tile(units, inner_unit, own, here, D, BLOCK_D)
    store_tile(grads2, grad2, own, here, D, BLOCK_D)
    tl.store(inverses + own, tl.sum(inner_inverse, 1), mask=here)
    write2 = (rates[:, None] * grad2).to(keys.dtype)
    raw1 = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K)
    scores1 = (raw1 * -taus).to(keys.dtype)
    mixed = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    read = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    before2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for column in range(0, C, BLOCK_C):
        one, bias, two = block_of(held, memory, place, column, True, D, BLOCK_D, C, BLOCK_C)
        x, write1, _total, _slope, _curve, _error = writes_of(keys, write2, one, bias, two, PRECISION)
        middle, before1 = _middle(
            queries, scores1, write1, one, bias, sums, pid, column, tau_row,
            D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION, OPENING,
        )  # fmt: skip
        active = gelu(middle)[0].to(keys.dtype)
        mixed = tl.dot(tl.trans(active), x, mixed, input_precision=PRECISION)
        read = over_units(active, two.to(keys.dtype), read, True, PRECISION)
        if OPENING:
            s_second = load_block(sums, pid, column, False, D, BLOCK_D, C, BLOCK_C)[2].to(keys.dtype)
            before2 = tl.dot(tl.trans(active), s_second, before2, input_precision=PRECISION)
    raw2 = causal(mixed + 1.0, BLOCK_K)
    scores2 = (raw2 * -taus).to(keys.dtype)
    read = tl.dot(scores2, write2, read, input_precision=PRECISION) + bias2[None, :]
    if OPENING:
        before2 += load_vector(t2, pid, D, BLOCK_D)[None, :]
        read -= taus * before2
    unit, inverse = standardised(read, eps, D, BLOCK_D)
    store_vector(dgamma, tl.sum(given * unit, 0), place, D, BLOCK_D)
    store_vector(dbeta, tl.sum(given, 0), place, D, BLOCK_D)
    wide = norm_backward(given, unit, inverse, gamma, D, BLOCK_D)
    d_read = wide.to(keys.dtype)
    scaled_read = (taus * wide).to(keys.dtype)
    store_tile(d_reads, d_read, own, here, D, BLOCK_D)
    d_mixed = causal(tl.dot(d_read, tl.trans(write2), input_precision=PRECISION), BLOCK_K)
    d_tau = -tl.sum(d_mixed * raw2, 1) - tl.sum(wide * before2, 1)
    d_mixed = (d_mixed * -taus).to(keys.dtype)
    store_tile(d_writes2, tl.dot(tl.trans(scores2), d_read, input_precision=PRECISION), own, here, D, BLOCK_D)
    d_raw1 = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    d_query = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for column in range(0, C, BLOCK_C):
        one, bias, two = block_of(held, memory, place, column, True, D, BLOCK_D, C, BLOCK_C)
        x, write1, _total, inner_slope, curve, error = writes_of(keys, write2, one, bias, two, PRECISION)
        to, within_c = turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
        tl.store(xs + to, x, mask=within_c)
        tl.store(slopes + to, inner_slope.to(keys.dtype), mask=within_c)
        tl.store(bends + to, (error * curve).to(keys.dtype), mask=within_c)
        tl.store(writes1 + to, write1, mask=within_c)
        middle, before1 = _middle(
            queries, scores1, write1, one, bias, sums, pid, column, tau_row,
            D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION, OPENING,
        )  # fmt: skip
        active, slope, _curve = gelu(middle)
        active = active.to(keys.dtype)
        d_active = tl.dot(two.to(keys.dtype), tl.trans(d_read), input_precision=PRECISION)
        d_active = tl.dot(x, tl.trans(d_mixed), d_active, input_precision=PRECISION)
        if OPENING:
            s_second = load_block(sums, pid, column, False, D, BLOCK_D, C, BLOCK_C)[2].to(keys.dtype)
            d_active -= tl.dot(s_second, tl.trans(scaled_read), input_precision=PRECISION)
        wide_middle = d_active * slope
        d_middle = wide_middle.to(keys.dtype)
        d_raw1 = tl.dot(tl.trans(d_middle), write1, d_raw1, input_precision=PRECISION)
        d_query = over_units(d_middle, one.to(keys.dtype), d_query, True, PRECISION)
        if OPENING:
            d_tau -= tl.sum(wide_middle * before1, 0)
            scaled = (tau_row[None, :] * wide_middle).to(keys.dtype)
            s_first = load_block(sums, pid, column, False, D, BLOCK_D, C, BLOCK_C)[0].to(keys.dtype)
            d_query -= tl.dot(tl.trans(scaled), s_first, input_precision=PRECISION)
            d_first = -tl.dot(scaled, queries, input_precision=PRECISION)
            d_second = -tl.dot(active, scaled_read, input_precision=PRECISION)
            d_bias = -tl.sum(tau_row[None, :] * wide_middle, 1)
            store_block((ds1, dt1, ds2), (d_first, d_bias, d_second), pid, column, False, D, BLOCK_D, C, BLOCK_C)
        tl.store(actives + to, active, mask=within_c)
        tl.store(d_middles + to, d_middle, mask=within_c)
        d_hidden = tl.dot(active, d_mixed, input_precision=PRECISION)
        tl.store(d_hiddens + to, d_hidden.to(keys.dtype), mask=within_c)
        d_write1 = tl.dot(d_middle, scores1, input_precision=PRECISION)
        tl.store(d_writes1 + to, d_write1.to(keys.dtype), mask=within_c)
    if OPENING:
        store_vector(dt2, -tl.sum(taus * wide, 0), pid, D, BLOCK_D)
    d_raw1 = causal(d_raw1, BLOCK_K)
    store_vector(dtau, d_tau - tl.sum(d_raw1 * raw1, 1), place, CHUNK, BLOCK_K)
    d_raw1 = (d_raw1 * -taus).to(keys.dtype)
    d_query = tl.dot(d_raw1, keys, d_query, input_precision=PRECISION)
    store_tile(dq, given + d_query, rows, inside, D, BLOCK_D)
    store_tile(d_keys, tl.dot(tl.trans(d_raw1), queries, input_precision=PRECISION), own, here, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_keys(
    position, cu_seqlens, owner, base, all_w1, d_keys, dz1, dk, num_tokens, num_sequences, first, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (places, heads). dk of the tokens: d_keys + dz1 W1ᵀ."""
    at, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    _n, c, start, length, phase, there = _place(
        at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed
    )  # fmt: skip
    if there == 0:
        return
    place = at.to(tl.int64) * H + h
    d_key = load_tile(d_keys, place * CHUNK + i, i < CHUNK, D, BLOCK_D)
    for column in range(0, C, BLOCK_C):
        to, within_c = turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
        below = tl.load(dz1 + to, mask=within_c, other=0.0)
        first_turned = second_layer(all_w1, place, column, D, BLOCK_D, C, BLOCK_C)
        d_key = tl.dot(tl.trans(below), first_turned, d_key, input_precision=PRECISION)
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    store_tile(dk, d_key, rows, inside, D, BLOCK_D)
