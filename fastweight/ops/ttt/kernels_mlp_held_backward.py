# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU with the memory in registers, backward (names as in kernels_mlp_backward.py; kernels_mlp_held.py).

`mlp_replay_held` has left what the forward pass needs. `mlp_reads_held`, one program per mini-batch and head, adds what
follows from dy alone; of dx and dP1, which also depend on the memory's gradient, it leaves only how they come to count:
E0 = dP1 ⊙ φ'(z1), the part of dE, and A0 = dx ⊙ φ'(z1) + dP1 ⊙ E ⊙ φ''(z1), that of dz1; and dP2 with E0 W2 in it.
`mlp_backward_held`, one program per sequence and head, goes from the last mini-batch to the first with the memory's
gradient in registers, U1 and U2ᵀ [D, C]. With pull1 = k U1 + u1, F = pull1 ⊙ φ'(z1), pull2 = x U2 + u2 and λ as there:
dP2 += λ (pull2 + F W2), dE = E0 + λ F; dr, dG → dz2, dY as there; X = λ P2 U2ᵀ + dz2 W2ᵀ;
dz1 = A0 + X ⊙ φ'(z1) + λ pull1 ⊙ E ⊙ φ''(z1); dk += λ P1 U1ᵀ − dY, dv = dY;
dW1 = dW1' + qᵀ dm + kᵀ dz1; dW2ᵀ = dW2'ᵀ + d readᵀ a + dz2ᵀ x + P2ᵀ dE; dS += λ U.
`mlp_keys_held`, one program per mini-batch and head, ends with dk += dz1 W1ᵀ.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp_held import load_memory, moments, quick_gelu, store_memory, turned_at
from fastweight.ops.ttt.kernels_shared import (
    causal,
    load_learning,
    load_tile,
    load_vector,
    rows_of,
    span_of,
    store_tile,
    store_vector,
    within,
)


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
def load_rounded(x, index, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr):
    """Matrix `index` of x [·, D, C]."""
    at, _turned, there = turned_at(index, D, BLOCK_D, C, WHOLE)
    return tl.load(x + at, mask=there, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_reads_held(
    dy, q, k, rate, tau, ln_weight, s1, t1, s2, t2, position, cu_seqlens, flags, owner, base,
    firsts, biases1, seconds, biases2, grads2, xs, writes1, slopes, bends,
    d_reads, d_writes2, d_keys, actives, d_middles, below1, errors, middles1, reads2,
    dq, dtau, dgamma, dbeta, ds1, dt1, ds2, dt2, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, OPENING: tl.constexpr,
):  # fmt: skip
    """Grid: (places, heads), a place being one mini-batch: stretches · EVERY of them (see `linear_replay`).

    OPENING: (sequences, heads) and only the first mini-batch of each sequence, else all but those.
    Written per place and head: d_reads in q's dtype, d_writes2, d_keys in float32 [·, CHUNK, D]; in q's dtype a, dm,
    A0, E0 [·, CHUNK, C]; in float32 the sums of dm [·, C] and d read [·, D], not rounded, dtau [·, CHUNK], dgamma,
    dbeta [·, D]; dq for the tokens; OPENING: ds1 …, too.
    """
    at, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    if OPENING:
        n = at
        start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
        c, at, there = first, tl.load(base + n) * EVERY, phase + length > 0
    else:
        n, c, start, length, phase, there = _place(
            at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed
        )  # fmt: skip
    if (there == 0) | ((c == 0) != OPENING):
        return
    place, pid, here = at.to(tl.int64) * H + h, n * H + h, i < CHUNK
    own = place * CHUNK + i
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=here, other=0.0).to(tl.float32)[:, None]
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    keys, _keys, rates, kept, refused = load_learning(k, k, rate, flags, rows, inside, D, BLOCK_D)
    queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D).to(tl.float32)
    one, two = (
        load_rounded(firsts, place, D, BLOCK_D, C, WHOLE),
        load_rounded(seconds, place, D, BLOCK_D, C, WHOLE),
    )
    x, write1 = load_tile(xs, own, here, C, WHOLE), load_tile(writes1, own, here, C, WHOLE)
    inner_slope, bend = load_tile(slopes, own, here, C, WHOLE), load_tile(bends, own, here, C, WHOLE)
    write2 = (rates[:, None] * load_tile(grads2, own, here, D, BLOCK_D)).to(keys.dtype)
    raw1 = causal(tl.dot(queries, tl.trans(keys)) + 1.0, BLOCK_K)
    scores1 = (raw1 * -taus).to(keys.dtype)
    middle = tl.dot(queries, one) + load_vector(biases1, place, C, WHOLE)[None, :]
    middle = tl.dot(scores1, write1, middle)
    if OPENING:
        s_one, s_bias1, s_two, s_bias2 = load_memory(s1, t1, s2, t2, pid, D, BLOCK_D, C, WHOLE)
        s_one, s_two = s_one.to(keys.dtype), s_two.to(keys.dtype)
        before1 = tl.dot(queries, s_one) + s_bias1[None, :]
        middle -= taus * before1
    active, slope, _curve = quick_gelu(middle)
    active = active.to(keys.dtype)
    raw2 = causal(tl.dot(active, tl.trans(x)) + 1.0, BLOCK_K)
    scores2 = (raw2 * -taus).to(keys.dtype)
    read = tl.dot(active, tl.trans(two))
    read = tl.dot(scores2, write2, read) + load_vector(biases2, place, D, BLOCK_D)[None, :]
    if OPENING:
        before2 = tl.dot(active, tl.trans(s_two)) + s_bias2[None, :]
        read -= taus * before2
    mean, inverse = moments(read, eps, D)
    unit = within((read - mean) * inverse, D, BLOCK_D)
    store_vector(dgamma, tl.sum(given * unit, 0), place, D, BLOCK_D)
    store_vector(dbeta, tl.sum(given, 0), place, D, BLOCK_D)
    scaled = given * gamma + 0.0 * unit
    mean, crossed = tl.reduce((scaled, scaled * unit), 1, _add_two)
    wide = within((scaled - (mean[:, None] + unit * crossed[:, None]) * (1.0 / D)) * inverse, D, BLOCK_D)
    d_read = wide.to(keys.dtype)
    store_tile(d_reads, d_read, own, here, D, BLOCK_D)
    store_vector(reads2, tl.sum(wide, 0), place, D, BLOCK_D)
    d_mixed = causal(tl.dot(d_read, tl.trans(write2)), BLOCK_K)
    d_tau = -tl.sum(d_mixed * raw2, 1)
    d_mixed = (d_mixed * -taus).to(keys.dtype)
    d_active = tl.dot(d_read, two)
    d_active = tl.dot(d_mixed, x, d_active)
    if OPENING:
        d_tau -= tl.sum(wide * before2, 1)
        scaled_read = (taus * wide).to(keys.dtype)
        d_active -= tl.dot(scaled_read, s_two)
    wide_middle = d_active * slope
    d_middle = wide_middle.to(keys.dtype)
    store_tile(actives, active, own, here, C, WHOLE)
    store_tile(d_middles, d_middle, own, here, C, WHOLE)
    store_vector(middles1, tl.sum(wide_middle, 0), place, C, WHOLE)
    d_write1 = tl.dot(tl.trans(scores1), d_middle)
    d_x = tl.dot(tl.trans(d_mixed), active)
    inner_slope = inner_slope.to(tl.float32)
    error = (d_write1 * inner_slope).to(keys.dtype)
    store_tile(errors, error, own, here, C, WHOLE)
    store_tile(below1, d_x * inner_slope + d_write1 * bend.to(tl.float32), own, here, C, WHOLE)
    d_write2 = tl.dot(tl.trans(scores2), d_read)
    d_write2 = tl.dot(error, tl.trans(two), d_write2)
    store_tile(d_writes2, d_write2, own, here, D, BLOCK_D)
    d_raw1 = causal(tl.dot(d_middle, tl.trans(write1)), BLOCK_K)
    d_query = tl.dot(d_middle, tl.trans(one))
    if OPENING:
        d_tau -= tl.sum(wide_middle * before1, 1)
        scaled_middle = (taus * wide_middle).to(keys.dtype)
        d_query -= tl.dot(scaled_middle, tl.trans(s_one))
        store_memory(
            ds1, dt1, ds2, dt2, -tl.dot(tl.trans(queries), scaled_middle), -tl.sum(taus * wide_middle, 0),
            -tl.dot(tl.trans(scaled_read), active), -tl.sum(taus * wide, 0), pid, D, BLOCK_D, C, WHOLE,
        )  # fmt: skip
    store_vector(dtau, d_tau - tl.sum(d_raw1 * raw1, 1), place, CHUNK, BLOCK_K)
    d_raw1 = (d_raw1 * -taus).to(keys.dtype)
    d_query = tl.dot(d_raw1, keys, d_query)
    store_tile(dq, given + d_query, rows, inside, D, BLOCK_D)
    store_tile(d_keys, tl.dot(tl.trans(d_raw1), queries), own, here, D, BLOCK_D)


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add_five(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def inner_step_backward(
    p, rates, unit, grad, gap, gamma, statistics, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """∂L/∂z2, ∂L/∂u and Σ_D p G, from p = ∂L/∂P2 = ∂L/∂G / r; as `inner_gradient_backward`, all sums at once.

    statistics: 1 / s, mean u, mean(u unit), mean(γ² unit), mean(γ² unit²) of each token; gap: γ (β − Y).
    """
    inverse, mean_u, mean_uu, once, twice = statistics
    gamma2, factor = gamma * gamma, 1.0 / D
    total, crossed, weighted, weighted_crossed, with_grad = tl.reduce(
        (p, p * unit, gamma2 * p, gamma2 * p * unit, p * grad), 1, _add_five
    )
    scale = rates * inverse
    mean_w, mean_wu = total * factor * scale, crossed * factor * scale
    mean_gamma2 = tl.sum(gamma * gamma) * factor
    # n = γ² ∂L/∂u − w mean(u unit) − u mean(w unit)
    mean_n = weighted * factor * scale - mean_w * mean_gamma2 - mean_wu * once - mean_uu * mean_w - mean_wu * mean_u
    mean_nu = weighted_crossed * factor * scale - mean_w * once - mean_wu * twice - 2.0 * mean_uu * mean_wu
    w = p * scale[:, None]
    du = within(w - mean_w[:, None] - unit * mean_wu[:, None], D, BLOCK_D)
    u = gamma2 * unit + gap
    n = gamma2 * du - mean_uu[:, None] * w - u * mean_wu[:, None]
    mean_eg = with_grad * rates * factor
    dz = (n - mean_n[:, None] - unit * (mean_nu + mean_eg)[:, None]) * inverse[:, None]
    return within(dz, D, BLOCK_D), du, with_grad


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "packed"])
def mlp_backward_held(
    q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, base,
    seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends,
    d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2, pulled, d_z1,
    ds1_out, dt1_out, ds2_out, dt2_out, dv, drate, dlast, dgamma, dbeta,
    dw1, db1, dw2, db2, ds1, dt1, ds2, dt2, num_tokens, first, stop, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed,
):  # fmt: skip
    """Grid: sequences · heads. Mini-batches stop − 1 … first of each sequence, backwards.

    In place: dw1, db1, dw2, db2 (the gradient of the memory after these mini-batches, then before them), dlast [N, H]
    (of τ_last), dgamma, dbeta [N, H, D] (added to), ds1 … with the first mini-batch. Written: dv, drate, dz1 in q's
    dtype, and in `pulled` what of dk is known here [·, CHUNK, D].
    """
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    one, bias1, two, bias2 = load_memory(dw1, db1, dw2, db2, pid, D, BLOCK_D, C, WHOLE)
    gammas, betas = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    lasts, last1 = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([WHOLE], tl.float32)
    opening_last = 0.0
    whole = (phase + length) // CHUNK
    end = tl.minimum(stop, (phase + length + CHUNK - 1) // CHUNK)
    stretch, here = tl.load(base + n).to(tl.int64), i < CHUNK
    # An unfinished mini-batch, those between, and the first: what is special about two of them stands before the loop.
    for piece in range(3):
        lowest = tl.where(piece == 0, tl.maximum(whole, first), tl.where(piece == 1, tl.maximum(first, 1), first))
        above = tl.where(piece == 0, end, tl.minimum(end, tl.where(piece == 1, whole, tl.minimum(whole, 1))))
        unfinished = (piece == 0) & (lowest < above)
        if unfinished:
            # The sums' gradient takes the place of the memory's, which is added to it again after the loop.
            one, bias1, two, bias2 = load_memory(ds1_out, dt1_out, ds2_out, dt2_out, pid, D, BLOCK_D, C, WHOLE)
        if (lowest == 0) & (lowest < above):
            rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
            refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
            scale = tl.where(unfinished, 1.0, tl.where(refused, 0.0, -last))
            counts = tl.where(unfinished | refused, 0.0, 1.0)
            s_one, s_bias1, s_two, s_bias2 = load_memory(s1, t1, s2, t2, pid, D, BLOCK_D, C, WHOLE)
            dot = tl.sum(tl.sum(one * s_one + two * s_two, 0) + bias1 * s_bias1) + tl.sum(bias2 * s_bias2)
            opening_last += counts * dot
            s_one, s_bias1, s_two, s_bias2 = load_memory(ds1, dt1, ds2, dt2, pid, D, BLOCK_D, C, WHOLE)
            store_memory(
                ds1, dt1, ds2, dt2, s_one + scale * one, s_bias1 + scale * bias1, s_two + scale * two,
                s_bias2 + scale * bias2, pid, D, BLOCK_D, C, WHOLE,
            )  # fmt: skip
        for back in range(above - lowest):
            c = above - 1 - back
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
            place = (stretch * EVERY + c - first) * H + h
            own = place * CHUNK + i
            counts = tl.where(unfinished | refused, 0.0, 1.0)
            scale = tl.where(unfinished, 1.0, -last * counts)
            u_one, u_two = one.to(keys.dtype), two.to(keys.dtype)
            slope = load_tile(slopes, own, here, C, WHOLE).to(tl.float32)
            pull1 = tl.dot(keys, u_one) + bias1[None, :]
            forced = (pull1 * slope).to(keys.dtype)
            pull2 = tl.dot(load_tile(xs, own, here, C, WHOLE), tl.trans(u_two)) + bias2[None, :]
            pull_key = tl.dot(load_tile(writes1, own, here, C, WHOLE), tl.trans(u_one))
            second = load_rounded(seconds, place, D, BLOCK_D, C, WHOLE)
            pull2_all = tl.dot(forced, tl.trans(second), pull2)
            d_write2 = load_tile(d_writes2, own, here, D, BLOCK_D) + scale * pull2_all
            unit, grad2 = load_tile(units, own, here, D, BLOCK_D), load_tile(grads2, own, here, D, BLOCK_D)
            wide2 = rates[:, None] * grad2
            write2 = wide2.to(keys.dtype)
            gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
            at = statistics + own * 8
            found = (
                tl.load(at, mask=here, other=0.0), tl.load(at + 1, mask=here, other=0.0),
                tl.load(at + 2, mask=here, other=0.0), tl.load(at + 3, mask=here, other=0.0),
                tl.load(at + 4, mask=here, other=0.0),
            )  # fmt: skip
            wide, du, d_rate = inner_step_backward(
                d_write2, rates, unit, grad2, gamma * gap, gamma, found, D, BLOCK_D
            )  # fmt: skip
            tl.store(drate + rows, tl.where(kept, d_rate, 0.0), mask=inside)
            dz2 = wide.to(keys.dtype)
            store_tile(dv, -gamma * du, rows, inside, D, BLOCK_D)
            store_tile(pulled, scale * pull_key + gamma * du, own, here, D, BLOCK_D)
            gammas += du * (2.0 * unit * gamma + gap)
            betas += du * gamma
            lasts += counts * (keys.to(tl.float32) * pull_key + pull2 * write2.to(tl.float32))
            last1 += counts * bias1 * load_vector(totals1, place, C, WHOLE)
            d_x = tl.dot((scale * write2.to(tl.float32)).to(keys.dtype), u_two)
            d_x = tl.dot(dz2, second, d_x)
            bend = load_tile(bends, own, here, C, WHOLE).to(tl.float32)
            wide1 = load_tile(below1, own, here, C, WHOLE).to(tl.float32) + d_x * slope + scale * pull1 * bend
            dz1 = wide1.to(keys.dtype)
            store_tile(d_z1, dz1, own, here, C, WHOLE)
            d_error = load_tile(errors, own, here, C, WHOLE).to(tl.float32) + scale * forced.to(tl.float32)
            queries, d_read = load_tile(q, rows, inside, D, BLOCK_D), load_tile(d_reads, own, here, D, BLOCK_D)
            d_middle = load_tile(d_middles, own, here, C, WHOLE)
            # Triton gives products that accumulate on one another a layout in which half of the warps repeat the work
            # of the others, but only looks for them within a block: the conditions, which always hold, part them.
            if num_tokens > 0:
                one = tl.dot(tl.trans(queries), d_middle, one)
                two = tl.dot(tl.trans(d_read), load_tile(actives, own, here, C, WHOLE), two)
            if stop > 0:
                two = tl.dot(tl.trans(dz2), load_tile(xs, own, here, C, WHOLE), two)
            one = tl.dot(tl.trans(keys), dz1, one)
            two = tl.dot(tl.trans(write2), d_error.to(keys.dtype), two)
            bias1 += load_vector(middles1, place, C, WHOLE) + tl.sum(wide1, 0)
            bias2 += load_vector(reads2, place, D, BLOCK_D) + tl.sum(wide, 0)
        if unfinished:
            whole_one, whole_bias1, whole_two, whole_bias2 = load_memory(
                dw1, db1, dw2, db2, pid, D, BLOCK_D, C, WHOLE
            )  # fmt: skip
            less_one, less_bias1, less_two, less_bias2 = load_memory(
                ds1_out, dt1_out, ds2_out, dt2_out, pid, D, BLOCK_D, C, WHOLE
            )  # fmt: skip
            one, two = one + (whole_one - less_one), two + (whole_two - less_two)
            bias1, bias2 = bias1 + (whole_bias1 - less_bias1), bias2 + (whole_bias2 - less_bias2)
    store_memory(dw1, db1, dw2, db2, one, bias1, two, bias2, pid, D, BLOCK_D, C, WHOLE)
    store_vector(dgamma, load_vector(dgamma, pid, D, BLOCK_D) + tl.sum(gammas, 0), pid, D, BLOCK_D)
    store_vector(dbeta, load_vector(dbeta, pid, D, BLOCK_D) + tl.sum(betas, 0), pid, D, BLOCK_D)
    d_last = opening_last + tl.sum(tl.sum(lasts, 1)) + tl.sum(last1)
    tl.store(dlast + pid, tl.load(dlast + pid) - d_last)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_keys_held(
    position, cu_seqlens, owner, base, firsts, d_keys, pulled, d_z1, dk, num_tokens, num_sequences, first, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed,
):  # fmt: skip
    """Grid: (places, heads). dk of the tokens: d_keys + pulled + dz1 W1ᵀ."""
    at, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    _n, c, start, length, phase, there = _place(
        at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed
    )  # fmt: skip
    if there == 0:
        return
    place = at.to(tl.int64) * H + h
    own = place * CHUNK + i
    d_key = load_tile(d_keys, own, i < CHUNK, D, BLOCK_D) + load_tile(pulled, own, i < CHUNK, D, BLOCK_D)
    below = load_tile(d_z1, own, i < CHUNK, C, WHOLE)
    d_key = tl.dot(below, tl.trans(load_rounded(firsts, place, D, BLOCK_D, C, WHOLE)), d_key)
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    store_tile(dk, d_key, rows, inside, D, BLOCK_D)
