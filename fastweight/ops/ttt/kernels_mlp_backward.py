# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, backward, in three kernels (names as in kernels_mlp.py; W1 … b2 of every mini-batch were replayed).

`mlp_reads`, one program per mini-batch and head, all at once: what does not need the memory's gradient.
d read through LN; dT2 = −τ tril(d read P2ᵀ); dP2 = −(τ T2)ᵀ d read; block by block
da = d read W2ᵀ + dT2 x − τ d read S2ᵀ, dx = dT2ᵀ a, dm = da ⊙ φ'(m1), dP1 = −(τ T1)ᵀ dm, dT1 = −τ tril(dm P1ᵀ);
dq = dy + dm W1ᵀ + dT1 k − τ dm S1ᵀ; dk = dT1ᵀ q; dS1 = −(τ q)ᵀ dm, dS2 = −(τ a)ᵀ d read;
dτ = −Σ_j (tril(dm P1ᵀ) T1 + tril(d read P2ᵀ) T2) − Σ dm (q S1 + t1) − Σ d read (a S2 + t2).
`mlp_backward`, one program per sequence and head, from the last mini-batch to the first: what needs it. Its products
are few, the forward pass it needs was stored, and dW1, dW2 stay in registers if they fit. U, λ: kernels_linear.py.
dP1 += λ (k U1 + u1); dP2 += λ (x U2 + u2) + dE W2, dE = dP1 ⊙ φ'(z1); dr = Σ_D dP2 G; dG = r dP2 → dz2, dY;
dx += λ P2 U2ᵀ + dz2 W2ᵀ; dz1 = dx ⊙ φ'(z1) + dP1 ⊙ E ⊙ φ''(z1); dk += λ P1 U1ᵀ − dY; dv = dY;
dW1 = dW1' + qᵀ dm + kᵀ dz1; dW2 = dW2' + aᵀ d read + xᵀ dz2 + dEᵀ P2; dS += λ U.
`mlp_keys`, again all mini-batches at once: dk += dz1 W1ᵀ.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp import block_of, first_layer, load_block, second_gradient, store_block, writes_of
from fastweight.ops.ttt.kernels_shared import (
    causal,
    gelu,
    inner_gradient_backward,
    load_learning,
    load_tile,
    load_vector,
    norm_backward,
    rows_of,
    span_of,
    standardised,
    store_tile,
    store_vector,
    within,
)


@triton.jit
def _turned_at(
    place, column, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Offsets and mask of a block of hidden units in a turned tile [·, C, CHUNK]."""
    j, i = column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    return place.to(tl.int64) * (C * CHUNK) + j[:, None] * CHUNK + i[None, :], (j < C)[:, None] & (i < CHUNK)[None, :]


@triton.jit
def _place(at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed):
    """Of place `at`: its sequence n, mini-batch c, start, length, phase, and whether there is such a mini-batch."""
    n = tl.load(owner + at // EVERY)
    there = n < num_sequences
    n = tl.where(there, n, 0)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    c = first + (at // EVERY - tl.load(base + n)) * EVERY + at % EVERY
    return n, c, start, length, phase, there & (c * CHUNK < phase + length)


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
    grad2, inner_unit, inner_inverse, u = second_gradient(
        keys, values, held, memory, place, bias2, eps, gamma, beta, True,
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
        x, write1, _slope, _curve, _error = writes_of(keys, write2, one, bias, two, PRECISION)
        middle, before1 = _middle(
            queries, scores1, write1, one, bias, sums, pid, column, tau_row,
            D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION, OPENING,
        )  # fmt: skip
        active = gelu(middle)[0].to(keys.dtype)
        mixed = tl.dot(tl.trans(active), x, mixed, input_precision=PRECISION)
        read = tl.dot(tl.trans(active), two.to(keys.dtype), read, input_precision=PRECISION)
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
        x, write1, inner_slope, curve, error = writes_of(keys, write2, one, bias, two, PRECISION)
        to, within_c = _turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
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
        d_query = tl.dot(tl.trans(d_middle), one.to(keys.dtype), d_query, input_precision=PRECISION)
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


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "packed"])
def mlp_backward(
    q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, base,
    all_w2, units, grads2, d_writes2, d_keys, d_reads, inverses,
    xs, slopes, bends, writes1, actives, d_middles, d_hiddens, d_writes1,
    ds1_out, dt1_out, ds2_out, dt2_out, dv, drate, dlast, dgamma, dbeta,
    dw1, db1, dw2, db2, ds1, dt1, ds2, dt2, num_tokens, first, stop, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Mini-batches stop − 1 … first of each sequence, backwards.

    In place: dw1, db1, dw2, db2 (the gradient of the memory after these mini-batches, then before them), dlast [N, H]
    (of τ_last), dgamma, dbeta [N, H, D] (added to), ds1 … with the first mini-batch; d_keys, to which `mlp_keys` adds
    last part; d_writes1, which become dz1. Written: dv, drate.
    """
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    memory, left, earlier, d_earlier = (dw1, db1, dw2), (ds1_out, dt1_out, ds2_out), (s1, t1, s2), (ds1, dt1, ds2)
    grad_first, grad_b1, grad_second = load_block(memory, pid, 0, False, D, BLOCK_D, C, BLOCK_C)
    grad_b2 = load_vector(db2, pid, D, BLOCK_D)
    grad_gamma, grad_beta = load_vector(dgamma, pid, D, BLOCK_D), load_vector(dbeta, pid, D, BLOCK_D)
    last1, last2 = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    whole = (phase + length) // CHUNK
    end = tl.minimum(stop, (phase + length + CHUNK - 1) // CHUNK)
    stretch = tl.load(base + n).to(tl.int64)
    # An unfinished mini-batch, those between, and the first: what is special about two of them stands before the loop.
    for piece in range(3):
        lowest = tl.where(piece == 0, tl.maximum(whole, first), tl.where(piece == 1, tl.maximum(first, 1), first))
        above = tl.where(piece == 0, end, tl.minimum(end, tl.where(piece == 1, whole, tl.minimum(whole, 1))))
        unfinished = (piece == 0) & (lowest < above)
        after_b2 = grad_b2
        if unfinished:
            after_b2 = load_vector(dt2_out, pid, D, BLOCK_D)
            if BLOCK_C >= C:
                # The sums' gradient takes the place of the memory's, which is added to it again after the loop.
                grad_first, grad_b1, grad_second = load_block(left, pid, 0, False, D, BLOCK_D, C, BLOCK_C)
        if (lowest == 0) & (lowest < above):
            rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
            refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
            scale = tl.where(unfinished, 1.0, tl.where(refused, 0.0, -last))
            counts = tl.where(unfinished | refused, 0.0, 1.0)
            old = load_vector(dt2, pid, D, BLOCK_D)
            store_vector(dt2, old + scale * after_b2, pid, D, BLOCK_D)
            last2 += counts * after_b2 * load_vector(t2, pid, D, BLOCK_D)
            for column in range(0, C, BLOCK_C):
                u_first, u_bias, u_second = _after(
                    (grad_first, grad_b1, grad_second), memory, left, pid, column, unfinished, D, BLOCK_D, C, BLOCK_C
                )  # fmt: skip
                s_first, s_bias, s_second = load_block(earlier, pid, column, False, D, BLOCK_D, C, BLOCK_C)
                last1 += counts * (tl.sum(u_first * s_first, 1) + u_bias * s_bias + tl.sum(u_second * s_second, 1))
                s_first, s_bias, s_second = load_block(d_earlier, pid, column, False, D, BLOCK_D, C, BLOCK_C)
                changed = (s_first + scale * u_first, s_bias + scale * u_bias, s_second + scale * u_second)
                store_block(d_earlier, changed, pid, column, False, D, BLOCK_D, C, BLOCK_C)
        for back in range(above - lowest):
            c = above - 1 - back
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
            queries = load_tile(q, rows, inside, D, BLOCK_D)
            place = (stretch * EVERY + c - first) * H + h
            own, here = place * CHUNK + i, i < CHUNK
            counts = tl.where(unfinished | refused, 0.0, 1.0)
            scale = tl.where(unfinished, 1.0, -last * counts)
            unit, grad2 = load_tile(units, own, here, D, BLOCK_D), load_tile(grads2, own, here, D, BLOCK_D)
            inverse = tl.load(inverses + own, mask=here, other=0.0)[:, None]
            gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
            u = within((unit * gamma + gap) * gamma, D, BLOCK_D)
            write2 = (rates[:, None] * grad2).to(keys.dtype)
            d_read, d_write2 = load_tile(d_reads, own, here, D, BLOCK_D), load_tile(d_writes2, own, here, D, BLOCK_D)
            pull2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
            pull_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
            for column in range(0, C, BLOCK_C):
                to, within_c = _turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
                u_first, u_bias, u_second = _after(
                    (grad_first, grad_b1, grad_second), memory, left, pid, column, unfinished, D, BLOCK_D, C, BLOCK_C
                )  # fmt: skip
                pull1 = first_layer(keys, u_first, u_bias, PRECISION)
                x = tl.load(xs + to, mask=within_c, other=0.0)
                pull2 = tl.dot(tl.trans(x), u_second.to(keys.dtype), pull2, input_precision=PRECISION)
                write1 = tl.load(writes1 + to, mask=within_c, other=0.0)
                last1 += counts * tl.sum(pull1 * write1.to(tl.float32), 1)
                pull_key = tl.dot(tl.trans(write1), u_first.to(keys.dtype), pull_key, input_precision=PRECISION)
                slope = tl.load(slopes + to, mask=within_c, other=0.0).to(tl.float32)
                d_write1 = tl.load(d_writes1 + to, mask=within_c, other=0.0).to(tl.float32) + scale * pull1
                two = _second_layer(all_w2, place, column, D, BLOCK_D, C, BLOCK_C)
                d_error = (d_write1 * slope).to(keys.dtype)
                d_write2 = tl.dot(tl.trans(d_error), two, d_write2, input_precision=PRECISION)
            pull2 += after_b2[None, :]
            d_write2 += scale * pull2
            last2 += counts * tl.sum(pull2 * write2.to(tl.float32), 0)
            d_rate = tl.sum(d_write2 * grad2, 1)
            tl.store(drate + rows, tl.where(kept, d_rate, 0.0), mask=inside)
            wide, du = inner_gradient_backward(rates[:, None] * d_write2, unit, inverse, grad2, u, gamma, D, BLOCK_D)
            grad_gamma += tl.sum(du * (2.0 * unit * gamma + gap), 0)
            grad_beta += tl.sum(du * gamma, 0)
            d_value, dz2 = -gamma * du, wide.to(keys.dtype)
            store_tile(dv, d_value, rows, inside, D, BLOCK_D)
            d_key = load_tile(d_keys, own, here, D, BLOCK_D) + scale * pull_key - d_value
            store_tile(d_keys, d_key, own, here, D, BLOCK_D)
            grad_b2 += tl.sum(d_read.to(tl.float32), 0) + tl.sum(wide, 0)
            after_b2 = grad_b2
            scaled2 = (scale * write2.to(tl.float32)).to(keys.dtype)
            for column in range(0, C, BLOCK_C):
                to, within_c = _turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
                u_first, u_bias, u_second = _after(
                    (grad_first, grad_b1, grad_second), memory, left, pid, column, unfinished, D, BLOCK_D, C, BLOCK_C
                )  # fmt: skip
                pull1 = first_layer(keys, u_first, u_bias, PRECISION)
                x = tl.load(xs + to, mask=within_c, other=0.0)
                slope = tl.load(slopes + to, mask=within_c, other=0.0).to(tl.float32)
                bend = tl.load(bends + to, mask=within_c, other=0.0).to(tl.float32)
                d_write1 = tl.load(d_writes1 + to, mask=within_c, other=0.0).to(tl.float32) + scale * pull1
                d_x = tl.load(d_hiddens + to, mask=within_c, other=0.0).to(tl.float32)
                d_x = tl.dot(u_second.to(keys.dtype), tl.trans(scaled2), d_x, input_precision=PRECISION)
                two = _second_layer(all_w2, place, column, D, BLOCK_D, C, BLOCK_C)
                d_x = tl.dot(two, tl.trans(dz2), d_x, input_precision=PRECISION)
                wide1 = d_x * slope + d_write1 * bend
                dz1, d_error = wide1.to(keys.dtype), (d_write1 * slope).to(keys.dtype)
                tl.store(d_writes1 + to, dz1, mask=within_c)
                d_middle = tl.load(d_middles + to, mask=within_c, other=0.0)
                active = tl.load(actives + to, mask=within_c, other=0.0)
                one, bias, two_grad = block_of(
                    (grad_first, grad_b1, grad_second), memory, pid, column, False, D, BLOCK_D, C, BLOCK_C
                )  # fmt: skip
                one = tl.dot(d_middle, queries, one, input_precision=PRECISION)
                one = tl.dot(dz1, keys, one, input_precision=PRECISION)
                bias += tl.sum(d_middle.to(tl.float32), 1) + tl.sum(wide1, 1)
                two_grad = tl.dot(active, d_read, two_grad, input_precision=PRECISION)
                two_grad = tl.dot(x, dz2, two_grad, input_precision=PRECISION)
                two_grad = tl.dot(d_error, write2, two_grad, input_precision=PRECISION)
                if BLOCK_C >= C:
                    grad_first, grad_b1, grad_second = one, bias, two_grad
                else:
                    store_block(memory, (one, bias, two_grad), pid, column, False, D, BLOCK_D, C, BLOCK_C)
            if BLOCK_C < C:
                tl.debug_barrier()  # the next mini-batch reads the gradients that other threads have stored
        if unfinished and BLOCK_C >= C:
            one, bias, two_grad = load_block(memory, pid, 0, False, D, BLOCK_D, C, BLOCK_C)
            less1, less_b, less2 = load_block(left, pid, 0, False, D, BLOCK_D, C, BLOCK_C)
            grad_first, grad_second = grad_first + (one - less1), grad_second + (two_grad - less2)
            grad_b1 += bias - less_b
    if BLOCK_C >= C:
        store_block(memory, (grad_first, grad_b1, grad_second), pid, 0, False, D, BLOCK_D, C, BLOCK_C)
    store_vector(db2, grad_b2, pid, D, BLOCK_D)
    store_vector(dgamma, grad_gamma, pid, D, BLOCK_D)
    store_vector(dbeta, grad_beta, pid, D, BLOCK_D)
    tl.store(dlast + pid, tl.load(dlast + pid) - tl.sum(last1) - tl.sum(last2))


@triton.jit
def _after(
    held, memory, left, pid, column, unfinished,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of U1 (turned), u1, U2: the memory's gradient where the mini-batch ends, else that of the sums left."""
    first, bias, second = block_of(held, memory, pid, column, False, D, BLOCK_D, C, BLOCK_C)
    if BLOCK_C < C and unfinished:
        first, bias, second = load_block(left, pid, column, False, D, BLOCK_D, C, BLOCK_C)
    return first, bias, second


@triton.jit
def _second_layer(
    w2, place, column, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """A block [BLOCK_C, BLOCK_D] of W2, or of W1 turned, of a place."""
    j, d = column + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    at = place.to(tl.int64) * (D * C) + j[:, None] * D + d[None, :]
    return tl.load(w2 + at, mask=(j < C)[:, None] & (d < D)[None, :], other=0.0)


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
        to, within_c = _turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
        below = tl.load(dz1 + to, mask=within_c, other=0.0)
        first_turned = _second_layer(all_w1, place, column, D, BLOCK_D, C, BLOCK_C)
        d_key = tl.dot(tl.trans(below), first_turned, d_key, input_precision=PRECISION)
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    store_tile(dk, d_key, rows, inside, D, BLOCK_D)
