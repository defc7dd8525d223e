# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU with the memory in registers, backward (names as in kernels_mlp_backward.py; kernels_mlp_held.py).

`mlp_replay_held` has left what the forward pass needs. `mlp_reads_held`, one program per mini-batch and head, adds what
follows from dy alone; of dx and dP1, which also depend on the memory's gradient, it leaves only how they come to count:
E0 = dP1 ⊙ φ'(z1), the part of dE, and A0 = dx ⊙ φ'(z1) + dP1 ⊙ E ⊙ φ''(z1), that of dz1; and dP2 with E0 W2 in it.
`mlp_walk_held` (kernels_mlp_held_walk.py) goes from the last mini-batch to the first with the memory's gradient in
registers, U1ᵀ and U2 [C, D]. With pull1 = k U1 + u1, F = pull1 ⊙ φ'(z1), pull2 = x U2 + u2 and λ as there:
dP2 += λ (pull2 + F W2), dE = E0 + λ F; dr, dG → dz2, dY as there; X = λ P2 U2ᵀ + dz2 W2ᵀ;
dz1 = A0 + X ⊙ φ'(z1) + λ pull1 ⊙ E ⊙ φ''(z1); dk += λ P1 U1ᵀ − dY, dv = dY;
dW1 = dW1' + qᵀ dm + kᵀ dz1; dW2 = dW2' + aᵀ d read + xᵀ dz2 + dEᵀ P2; dS += λ U.
`mlp_keys_held`, one program per mini-batch and head, ends with dk += dz1 W1ᵀ.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_handed_on import load_folded, load_own, load_whole, store_folded, store_own
from fastweight.ops.ttt.kernels_mlp_held import (
    load_memory,
    moments,
    quick_gelu,
    store_memory,
)
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
def read_one(
    c, place, tokens, made, left, dq, shared, sums, d_sums, span, gamma, taus, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """What follows from dy alone for mini-batch c, which is number `place` of those kept. Pointers: tokens: dy, q, k,
    rate, flags; made: what `mlp_replay_held` left; left: what is handed on; shared: dτ, dγ, dβ."""
    dy, q, k, rate, flags = tokens
    firsts, biases1, seconds, biases2, grads2, xs, writes1, slopes, bends = made
    d_reads, d_writes2, d_keys, actives, d_middles, below1, errors, middles1, reads2 = left
    dtau, dgamma, dbeta = shared
    s1, t1, s2, t2 = sums
    ds1, dt1, ds2, dt2 = d_sums
    start, length, phase, pid, h, H = span
    i = tl.arange(0, BLOCK_K)
    bias1, bias2 = load_vector(biases1, place, C, WHOLE)[None, :], load_vector(biases2, place, D, BLOCK_D)[None, :]
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    keys, _keys, rates, kept, refused = load_learning(k, k, rate, flags, rows, inside, D, BLOCK_D)
    queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D).to(tl.float32)
    one, two = load_whole(firsts, place, D, BLOCK_D, C, WHOLE), load_whole(seconds, place, D, BLOCK_D, C, WHOLE)
    x = load_own(xs, place, i, CHUNK, BLOCK_K, C, WHOLE)
    write1 = load_own(writes1, place, i, CHUNK, BLOCK_K, C, WHOLE)
    write2 = (rates[:, None] * load_folded(grads2, place, BLOCK_K, BLOCK_D, WARPS)).to(keys.dtype)
    raw1 = causal(tl.dot(queries, tl.trans(keys)) + 1.0, BLOCK_K)
    scores1 = (raw1 * -taus).to(keys.dtype)
    middle = tl.dot(queries, one) + bias1
    middle = tl.dot(scores1, write1, middle)
    if OPENING:
        s_one, s_bias1, s_two, s_bias2 = load_memory(s1, t1, s2, t2, pid, D, BLOCK_D, C, WHOLE, False)
        s_one, s_two = s_one.to(keys.dtype), s_two.to(keys.dtype)
        before1 = tl.dot(queries, s_one) + s_bias1[None, :]
        middle -= taus * before1
    active, slope, _curve = quick_gelu(middle)
    active = active.to(keys.dtype)
    raw2 = causal(tl.dot(active, tl.trans(x)) + 1.0, BLOCK_K)
    scores2 = (raw2 * -taus).to(keys.dtype)
    read = tl.dot(active, tl.trans(two))
    read = tl.dot(scores2, write2, read) + bias2
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
    store_own(d_reads, d_read, place, i, CHUNK, D, BLOCK_D)
    store_vector(reads2, tl.sum(wide, 0), place, D, BLOCK_D)
    d_mixed = causal(tl.dot(d_read, tl.trans(write2)), BLOCK_K)
    d_taus = d_mixed * raw2  # of each score; they are summed once
    d_mixed = (d_mixed * -taus).to(keys.dtype)
    d_active = tl.dot(d_read, two)
    d_active = tl.dot(d_mixed, x, d_active)
    if OPENING:
        d_tau = tl.sum(wide * before2, 1)
        scaled_read = (taus * wide).to(keys.dtype)
        d_active -= tl.dot(scaled_read, s_two)
    wide_middle = d_active * slope
    d_middle = wide_middle.to(keys.dtype)
    store_own(actives, active, place, i, CHUNK, C, WHOLE)
    store_own(d_middles, d_middle, place, i, CHUNK, C, WHOLE)
    store_vector(middles1, tl.sum(wide_middle, 0), place, C, WHOLE)
    d_write1 = tl.dot(tl.trans(scores1), d_middle)
    d_x = tl.dot(tl.trans(d_mixed), active)
    inner_slope = load_folded(slopes, place, BLOCK_K, WHOLE, WARPS).to(tl.float32)
    bend = load_folded(bends, place, BLOCK_K, WHOLE, WARPS)
    error = (d_write1 * inner_slope).to(keys.dtype)
    store_folded(errors, error, place, CHUNK, BLOCK_K, C, WHOLE, WARPS)
    below = d_x * inner_slope + d_write1 * bend.to(tl.float32)
    store_folded(below1, below, place, CHUNK, BLOCK_K, C, WHOLE, WARPS)
    d_write2 = tl.dot(tl.trans(scores2), d_read)
    d_write2 = tl.dot(error, tl.trans(two), d_write2)
    store_folded(d_writes2, d_write2, place, CHUNK, BLOCK_K, D, BLOCK_D, WARPS)
    d_raw1 = causal(tl.dot(d_middle, tl.trans(write1)), BLOCK_K)
    d_query = tl.dot(d_middle, tl.trans(one))
    if OPENING:
        d_tau += tl.sum(wide_middle * before1, 1)
        scaled_middle = (taus * wide_middle).to(keys.dtype)
        d_query -= tl.dot(scaled_middle, tl.trans(s_one))
        store_memory(
            ds1, dt1, ds2, dt2, -tl.dot(tl.trans(queries), scaled_middle), -tl.sum(taus * wide_middle, 0),
            -tl.dot(tl.trans(scaled_read), active), -tl.sum(taus * wide, 0), pid, D, BLOCK_D, C, WHOLE, False,
        )  # fmt: skip
    of_scores = tl.sum(d_taus + d_raw1 * raw1, 1)
    store_vector(dtau, -(of_scores + d_tau if OPENING else of_scores), place, CHUNK, BLOCK_K)
    d_raw1 = (d_raw1 * -taus).to(keys.dtype)
    d_query = tl.dot(d_raw1, keys, d_query)
    store_tile(dq, given + d_query, rows, inside, D, BLOCK_D)
    store_own(d_keys, tl.dot(tl.trans(d_raw1), queries), place, i, CHUNK, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "to_sums", "packed"])
def mlp_reads_held(
    dy, q, k, rate, tau, ln_weight, s1, t1, s2, t2, position, cu_seqlens, flags, owner, base,
    firsts, biases1, seconds, biases2, grads2, xs, writes1, slopes, bends,
    d_reads, d_writes2, d_keys, actives, d_middles, below1, errors, middles1, reads2,
    dq, dtau, dgamma, dbeta, ds1, dt1, ds2, dt2, num_tokens, num_sequences, first, to_sums, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, WARPS: tl.constexpr,
    STEP: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """Grid: (places / STEP, heads), a place being one mini-batch: stretches · EVERY of them (see `linear_replay`). Each
    program reads STEP in a row, a divisor of EVERY.

    OPENING: (sequences, heads) and only the first mini-batch of each sequence that began before the call, or of each
    where a gradient goes to the sums; else all but those.
    Written per place and head: d_reads in q's dtype, d_keys in float32 [·, CHUNK, D], d_writes2 folded; in q's dtype a,
    dm [·, CHUNK, C], folded A0, E0; in float32 the sums of dm [·, C] and d read [·, D], not rounded, dtau [·, CHUNK],
    dgamma, dbeta [·, D]; dq for the tokens; OPENING: ds1 …, too.
    """
    at, h = tl.program_id(0), tl.program_id(1)
    if OPENING:
        n = at
        start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
        c, at, there = first, tl.load(base + n) * EVERY, phase + length > 0
    else:
        at *= STEP
        n, c, start, length, phase, there = _place(
            at, owner, base, first, num_sequences, position, cu_seqlens, num_tokens, CHUNK, EVERY, packed
        )  # fmt: skip
    special = (c == 0) & ((phase > 0) | (to_sums > 0))
    if (there == 0) | (OPENING & (special == 0)):
        return
    lowest = tl.where(special & (not OPENING), 1, 0)
    above = tl.minimum(STEP, (phase + length + CHUNK - 1) // CHUNK - c)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    i = tl.arange(0, BLOCK_K)
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    made = (firsts, biases1, seconds, biases2, grads2, xs, writes1, slopes, bends)
    left = (d_reads, d_writes2, d_keys, actives, d_middles, below1, errors, middles1, reads2)
    shared, sums, d_sums = (dtau, dgamma, dbeta), (s1, t1, s2, t2), (ds1, dt1, ds2, dt2)
    for ahead in range(lowest, 1 if OPENING else above):
        place = (at + ahead).to(tl.int64) * H + h
        read_one(
            c + ahead, place, (dy, q, k, rate, flags), made, left, dq, shared, sums, d_sums,
            (start, length, phase, n * H + h, h, H), gamma, taus, eps, D, BLOCK_D, C, WHOLE, CHUNK, BLOCK_K, WARPS,
            OPENING,
        )  # fmt: skip


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
    d_key = load_own(d_keys, place, i, CHUNK, BLOCK_K, D, BLOCK_D)
    d_key += load_own(pulled, place, i, CHUNK, BLOCK_K, D, BLOCK_D)
    below = load_own(d_z1, place, i, CHUNK, BLOCK_K, C, WHOLE)
    d_key = tl.dot(below, tl.trans(load_whole(firsts, place, D, BLOCK_D, C, WHOLE)), d_key)
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    store_tile(dk, d_key, rows, inside, D, BLOCK_D)
