# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, backward, in two kernels (names as in kernels_mlp.py; W1 … b2 of every mini-batch were replayed).

`mlp_reads`, one program per mini-batch and head, all at once: what follows from dy alone.
d read through LN; dT2 = −τ tril(d read P2ᵀ); dP2 = −(τ T2)ᵀ d read; block by block
da = d read W2ᵀ + dT2 x − τ d read S2ᵀ, dx = dT2ᵀ a, dm = da ⊙ φ'(m1), dP1 = −(τ T1)ᵀ dm, dT1 = −τ tril(dm P1ᵀ);
dq = dy + dm W1ᵀ + dT1 k − τ dm S1ᵀ; dk = dT1ᵀ q; dS1 = −(τ q)ᵀ dm, dS2 = −(τ a)ᵀ d read;
dτ = −Σ_j (tril(dm P1ᵀ) T1 + tril(d read P2ᵀ) T2) − Σ dm (q S1 + t1) − Σ d read (a S2 + t2).
`mlp_backward`, one program per sequence and head, from the last mini-batch to the first: what also needs the memory's
gradient. With U, λ as in kernels_linear.py:
dP1 += λ (k U1 + u1); dP2 += λ (x U2 + u2) + dE W2, dE = dP1 ⊙ φ'(z1); dr = Σ_D dP2 G; dG = r dP2 → dz2, dY;
dx += λ P2 U2ᵀ + dz2 W2ᵀ; dz1 = dx ⊙ φ'(z1) + dP1 ⊙ E ⊙ φ''(z1); dk += λ P1 U1ᵀ + dz1 W1ᵀ − dY; dv = dY;
dW1 = dW1' + qᵀ dm + kᵀ dz1; dW2 = dW2' + aᵀ d read + xᵀ dz2 + dEᵀ P2; dS += λ U.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp import block_at, hidden, second_gradient
from fastweight.ops.ttt.kernels_shared import (
    causal,
    gelu,
    inner_gradient,
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
)


@triton.jit
def _wide_tile(x, rows, here, column, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to columns of x [·, C], and which of them exist."""
    j = column + tl.arange(0, BLOCK_C)
    return x + rows[:, None] * C + j[None, :], here[:, None] & (j < C)[None, :]


@triton.jit
def _middle(
    q, k, scores, write2, w1, b1, w2, s1, t1, place, pid, column, taus, opening,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one block of hidden units: x, P1, m1, q S1 + t1, W1 and W2."""
    at1, in1, at2, in2, at_b, in_b = block_at(place, column, D, BLOCK_D, C, BLOCK_C)
    z1, first, bias1 = hidden(k, w1, b1, at1, in1, at_b, in_b, PRECISION)
    second = tl.load(w2 + at2, mask=in2, other=0.0).to(k.dtype)
    x, slope, _curve = gelu(z1)
    write1 = (tl.dot(write2, tl.trans(second), input_precision=PRECISION) * slope).to(k.dtype)
    first = first.to(k.dtype)
    middle = tl.dot(q, first, input_precision=PRECISION) + bias1[None, :]
    middle -= tl.dot(scores, write1, input_precision=PRECISION)
    before = tl.zeros_like(middle)
    if opening:
        s_at1, s_in1, s_at2, s_in2, s_at_b, s_in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        earlier = tl.load(s1 + s_at1, mask=s_in1, other=0.0).to(k.dtype)
        before = tl.dot(q, earlier, input_precision=PRECISION) + tl.load(t1 + s_at_b, mask=s_in_b, other=0.0)[None, :]
        middle -= taus * before
    return x.to(k.dtype), write1, middle, before, first, second


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_reads(
    dy, q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, owner, base,
    all_w1, all_b1, all_w2, all_b2, z2s, d_reads, d_writes2, d_keys, actives, d_middles, d_hiddens, d_writes1,
    dq, dtau, dgamma, dbeta, ds1, dt1, ds2, dt2, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (places, heads), a place being one mini-batch: stretches · EVERY of them (see `linear_replay`).

    Written per place and head: z2s, d_writes2, d_keys [·, CHUNK, D] float32, d_reads [·, CHUNK, D], actives, d_middles,
    d_hiddens, d_writes1 [·, CHUNK, C] in q's dtype, dtau [·, CHUNK], dgamma, dbeta [·, D]; dq for the tokens; ds1 …
    with a sequence's first mini-batch.
    """
    at, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    stretch = at // EVERY
    n = tl.load(owner + stretch)
    if n >= num_sequences:
        return
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    c = first + (stretch - tl.load(base + n)) * EVERY + at % EVERY
    if c * CHUNK >= phase + length:
        return
    place, pid, opening = at.to(tl.int64) * H + h, n * H + h, c == 0
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
    queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D).to(tl.float32)
    own, here = place * CHUNK + i, i < CHUNK
    bias2 = load_vector(all_b2, place, D, BLOCK_D)
    z2, grad2 = second_gradient(
        keys, values, all_w1, all_b1, all_w2, bias2, place, eps, gamma, beta, D, BLOCK_D, C, BLOCK_C, BLOCK_K, PRECISION
    )  # fmt: skip
    store_tile(z2s, z2, own, here, D, BLOCK_D)
    write2 = (rates[:, None] * grad2).to(keys.dtype)
    raw1 = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K)
    scores1 = (raw1 * taus).to(keys.dtype)
    mixed = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    read = tl.zeros([BLOCK_K, BLOCK_D], tl.float32) + bias2[None, :]
    before2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for column in range(0, C, BLOCK_C):
        x, write1, middle, before1, one, two = _middle(
            queries, keys, scores1, write2, all_w1, all_b1, all_w2, s1, t1, place, pid, column, taus, opening,
            D, BLOCK_D, C, BLOCK_C, PRECISION,
        )  # fmt: skip
        active = gelu(middle)[0].to(keys.dtype)
        mixed += tl.dot(active, tl.trans(x), input_precision=PRECISION)
        read += tl.dot(active, two, input_precision=PRECISION)
        if opening:
            at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
            earlier = tl.load(s2 + at2, mask=in2, other=0.0).to(keys.dtype)
            before2 += tl.dot(active, earlier, input_precision=PRECISION)
    raw2 = causal(mixed + 1.0, BLOCK_K)
    scores2 = (raw2 * taus).to(keys.dtype)
    read -= tl.dot(scores2, write2, input_precision=PRECISION)
    if opening:
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
    store_tile(d_writes2, -tl.dot(tl.trans(scores2), d_read, input_precision=PRECISION), own, here, D, BLOCK_D)
    d_raw1 = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    d_query = given
    for column in range(0, C, BLOCK_C):
        x, write1, middle, before1, one, two = _middle(
            queries, keys, scores1, write2, all_w1, all_b1, all_w2, s1, t1, place, pid, column, taus, opening,
            D, BLOCK_D, C, BLOCK_C, PRECISION,
        )  # fmt: skip
        active, slope, _curve = gelu(middle)
        active = active.to(keys.dtype)
        d_active = tl.dot(d_read, tl.trans(two), input_precision=PRECISION)
        d_active += tl.dot(d_mixed, x, input_precision=PRECISION)
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        if opening:
            earlier = tl.load(s2 + at2, mask=in2, other=0.0).to(keys.dtype)
            d_active -= tl.dot(scaled_read, tl.trans(earlier), input_precision=PRECISION)
            tl.store(ds2 + at2, -tl.dot(tl.trans(active), scaled_read, input_precision=PRECISION), mask=in2)
        wide_middle = d_active * slope
        d_middle = wide_middle.to(keys.dtype)
        d_tau -= tl.sum(wide_middle * before1, 1)
        d_raw1 += tl.dot(d_middle, tl.trans(write1), input_precision=PRECISION)
        d_query += tl.dot(d_middle, tl.trans(one), input_precision=PRECISION)
        if opening:
            scaled = (taus * wide_middle).to(keys.dtype)
            earlier = tl.load(s1 + at1, mask=in1, other=0.0).to(keys.dtype)
            d_query -= tl.dot(scaled, tl.trans(earlier), input_precision=PRECISION)
            tl.store(ds1 + at1, -tl.dot(tl.trans(queries), scaled, input_precision=PRECISION), mask=in1)
            tl.store(dt1 + at_b, -tl.sum(taus * wide_middle, 0), mask=in_b)
        to, there = _wide_tile(actives, own, here, column, C, BLOCK_C)
        tl.store(to, active, mask=there)
        to, there = _wide_tile(d_middles, own, here, column, C, BLOCK_C)
        tl.store(to, d_middle, mask=there)
        to, there = _wide_tile(d_hiddens, own, here, column, C, BLOCK_C)
        d_hidden = tl.dot(tl.trans(d_mixed), active, input_precision=PRECISION)
        tl.store(to, d_hidden.to(keys.dtype), mask=there)
        to, there = _wide_tile(d_writes1, own, here, column, C, BLOCK_C)
        d_write1 = -tl.dot(tl.trans(scores1), d_middle, input_precision=PRECISION)
        tl.store(to, d_write1.to(keys.dtype), mask=there)
    if opening:
        store_vector(dt2, -tl.sum(taus * wide, 0), pid, D, BLOCK_D)
    d_raw1 = causal(d_raw1, BLOCK_K)
    store_vector(dtau, d_tau - tl.sum(d_raw1 * raw1, 1), place, CHUNK, BLOCK_K)
    d_raw1 = (d_raw1 * -taus).to(keys.dtype)
    d_query += tl.dot(d_raw1, keys, input_precision=PRECISION)
    store_tile(dq, d_query, rows, inside, D, BLOCK_D)
    store_tile(d_keys, tl.dot(tl.trans(d_raw1), queries, input_precision=PRECISION), own, here, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "packed"])
def mlp_backward(
    q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, base,
    all_w1, all_b1, all_w2, all_b2, z2s, d_reads, d_writes2, d_keys, actives, d_middles, d_hiddens, d_writes1,
    ds1_out, dt1_out, ds2_out, dt2_out, dk, dv, drate, dlast, dgamma, dbeta,
    dw1, db1, dw2, db2, ds1, dt1, ds2, dt2, num_tokens, first, stop, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Mini-batches stop − 1 … first of each sequence, backwards.

    In place: dw1, db1, dw2, db2 (the gradient of the memory after these mini-batches, then before them), dlast [N, H]
    (of τ_last), dgamma, dbeta [N, H, D] (added to), ds1 … with the first mini-batch. Written: dk, dv, drate.
    """
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    grad_b2 = load_vector(db2, pid, D, BLOCK_D)
    grad_gamma, grad_beta = load_vector(dgamma, pid, D, BLOCK_D), load_vector(dbeta, pid, D, BLOCK_D)
    grad_last = tl.load(dlast + pid)
    end = tl.minimum(stop, (phase + length + CHUNK - 1) // CHUNK)
    stretch = tl.load(base + n).to(tl.int64)
    for back in range(end - first):
        c = end - 1 - back
        rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
        keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
        queries = load_tile(q, rows, inside, D, BLOCK_D)
        place = (stretch * EVERY + c - first) * H + h
        own, here = place * CHUNK + i, i < CHUNK
        opening, full = c == 0, (c + 1) * CHUNK <= phase + length
        scale = tl.where(full, tl.where(refused, 0.0, -last), 1.0)
        unit, inverse = standardised(load_tile(z2s, own, here, D, BLOCK_D), eps, D, BLOCK_D)
        gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
        grad2, u = inner_gradient(unit, inverse, gap, gamma, D, BLOCK_D)
        write2 = (rates[:, None] * grad2).to(keys.dtype)
        d_read = load_tile(d_reads, own, here, D, BLOCK_D)
        d_write2 = load_tile(d_writes2, own, here, D, BLOCK_D)
        d_key = load_tile(d_keys, own, here, D, BLOCK_D)
        after_b = grad_b2
        if full == 0:
            after_b = load_vector(dt2_out, pid, D, BLOCK_D)
        pull2 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32) + after_b[None, :]
        d_last = 0.0
        if opening:
            d_last += tl.sum(after_b * load_vector(t2, pid, D, BLOCK_D))
            store_vector(dt2, load_vector(dt2, pid, D, BLOCK_D) + scale * after_b, pid, D, BLOCK_D)
        for column in range(0, C, BLOCK_C):
            at1, in1, at2, in2, at_b, in_b = block_at(place, column, D, BLOCK_D, C, BLOCK_C)
            to1, to_in1, to2, to_in2, to_b, to_in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
            x, slope, _curve = gelu(hidden(keys, all_w1, all_b1, at1, in1, at_b, in_b, PRECISION)[0])
            two = tl.load(all_w2 + at2, mask=in2, other=0.0).to(keys.dtype)
            write1 = (tl.dot(write2, tl.trans(two), input_precision=PRECISION) * slope).to(keys.dtype)
            after1, after1_b, after2 = _after(
                full, dw1, db1, dw2, ds1_out, dt1_out, ds2_out, to1, to_in1, to_b, to_in_b, to2, to_in2
            )
            if opening:
                d_last += tl.sum(after1 * tl.load(s1 + to1, mask=to_in1, other=0.0))
                d_last += tl.sum(after1_b * tl.load(t1 + to_b, mask=to_in_b, other=0.0))
                d_last += tl.sum(after2 * tl.load(s2 + to2, mask=to_in2, other=0.0))
                tl.store(ds1 + to1, tl.load(ds1 + to1, mask=to_in1, other=0.0) + scale * after1, mask=to_in1)
                tl.store(dt1 + to_b, tl.load(dt1 + to_b, mask=to_in_b, other=0.0) + scale * after1_b, mask=to_in_b)
                tl.store(ds2 + to2, tl.load(ds2 + to2, mask=to_in2, other=0.0) + scale * after2, mask=to_in2)
            after1, after2 = after1.to(keys.dtype), after2.to(keys.dtype)
            pull1 = tl.dot(keys, after1, input_precision=PRECISION) + after1_b[None, :]
            pull2 += tl.dot(x.to(keys.dtype), after2, input_precision=PRECISION)
            d_last += tl.sum(pull1 * write1.to(tl.float32))
            source, there = _wide_tile(d_writes1, own, here, column, C, BLOCK_C)
            d_write1 = tl.load(source, mask=there, other=0.0).to(tl.float32) + scale * pull1
            d_error = (d_write1 * slope).to(keys.dtype)
            d_write2 += tl.dot(d_error, two, input_precision=PRECISION)
            d_key += scale * tl.dot(write1, tl.trans(after1), input_precision=PRECISION)
        d_write2 += scale * pull2
        d_last += tl.sum(pull2 * write2.to(tl.float32))
        grad_last -= tl.where(full & (refused == 0), d_last, 0.0)
        tl.store(drate + rows, tl.where(kept, tl.sum(d_write2 * grad2, 1), 0.0), mask=inside)
        wide, du = inner_gradient_backward(rates[:, None] * d_write2, unit, inverse, grad2, u, gamma, D, BLOCK_D)
        grad_gamma += tl.sum(du * (2.0 * unit * gamma + gap), 0)
        grad_beta += tl.sum(du * gamma, 0)
        d_value, dz2 = -gamma * du, wide.to(keys.dtype)
        for column in range(0, C, BLOCK_C):
            at1, in1, at2, in2, at_b, in_b = block_at(place, column, D, BLOCK_D, C, BLOCK_C)
            to1, to_in1, to2, to_in2, to_b, to_in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
            z1, one, bias1 = hidden(keys, all_w1, all_b1, at1, in1, at_b, in_b, PRECISION)
            x, slope, curve = gelu(z1)
            two = tl.load(all_w2 + at2, mask=in2, other=0.0).to(keys.dtype)
            error = tl.dot(write2, tl.trans(two), input_precision=PRECISION)
            after1, after1_b, after2 = _after(
                full, dw1, db1, dw2, ds1_out, dt1_out, ds2_out, to1, to_in1, to_b, to_in_b, to2, to_in2
            )
            pull1 = tl.dot(keys, after1.to(keys.dtype), input_precision=PRECISION) + after1_b[None, :]
            source, there = _wide_tile(d_writes1, own, here, column, C, BLOCK_C)
            d_write1 = tl.load(source, mask=there, other=0.0).to(tl.float32) + scale * pull1
            source, there = _wide_tile(d_hiddens, own, here, column, C, BLOCK_C)
            d_x = tl.load(source, mask=there, other=0.0).to(tl.float32)
            d_x += scale * tl.dot(write2, tl.trans(after2.to(keys.dtype)), input_precision=PRECISION)
            d_x += tl.dot(dz2, tl.trans(two), input_precision=PRECISION)
            wide1 = d_x * slope + d_write1 * error * curve
            dz1 = wide1.to(keys.dtype)
            d_key += tl.dot(dz1, tl.trans(one.to(keys.dtype)), input_precision=PRECISION)
            source, there = _wide_tile(d_middles, own, here, column, C, BLOCK_C)
            d_middle = tl.load(source, mask=there, other=0.0)
            new1 = tl.load(dw1 + to1, mask=to_in1, other=0.0)
            new1 += tl.dot(tl.trans(queries), d_middle, input_precision=PRECISION)
            new1 += tl.dot(tl.trans(keys), dz1, input_precision=PRECISION)
            tl.store(dw1 + to1, new1, mask=to_in1)
            new_b = tl.load(db1 + to_b, mask=to_in_b, other=0.0)
            new_b += tl.sum(d_middle.to(tl.float32), 0) + tl.sum(wide1, 0)
            tl.store(db1 + to_b, new_b, mask=to_in_b)
            source, there = _wide_tile(actives, own, here, column, C, BLOCK_C)
            active = tl.load(source, mask=there, other=0.0)
            d_error = (d_write1 * slope).to(keys.dtype)
            new2 = tl.load(dw2 + to2, mask=to_in2, other=0.0)
            new2 += tl.dot(tl.trans(active), d_read, input_precision=PRECISION)
            new2 += tl.dot(tl.trans(x.to(keys.dtype)), dz2, input_precision=PRECISION)
            new2 += tl.dot(tl.trans(d_error), write2, input_precision=PRECISION)
            tl.store(dw2 + to2, new2, mask=to_in2)
        grad_b2 += tl.sum(d_read.to(tl.float32), 0) + tl.sum(wide, 0)
        store_tile(dk, d_key - d_value, rows, inside, D, BLOCK_D)
        store_tile(dv, d_value, rows, inside, D, BLOCK_D)
        tl.debug_barrier()  # the next mini-batch reads the gradients that other threads have stored
    store_vector(db2, grad_b2, pid, D, BLOCK_D)
    store_vector(dgamma, grad_gamma, pid, D, BLOCK_D)
    store_vector(dbeta, grad_beta, pid, D, BLOCK_D)
    tl.store(dlast + pid, grad_last)


@triton.jit
def _after(full, dw1, db1, dw2, ds1_out, dt1_out, ds2_out, to1, in1, to_b, in_b, to2, in2):
    """A block of U1, u1, U2: the memory's gradient where the mini-batch ends, else that of the sums left behind."""
    after1 = tl.load(dw1 + to1, mask=in1 & full, other=0.0)
    after1_b = tl.load(db1 + to_b, mask=in_b & full, other=0.0)
    after2 = tl.load(dw2 + to2, mask=in2 & full, other=0.0)
    if full == 0:
        after1 = tl.load(ds1_out + to1, mask=in1, other=0.0)
        after1_b = tl.load(dt1_out + to_b, mask=in_b, other=0.0)
        after2 = tl.load(ds2_out + to2, mask=in2, other=0.0)
    return after1, after1_b, after2
