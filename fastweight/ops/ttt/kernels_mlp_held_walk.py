# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU with the memory in registers: back through the mini-batches (kernels_mlp_held_backward.py).

`mlp_walk_held`, one program per sequence and head, does whole mini-batches but the first of a sequence, from the last
to the first; `mlp_end_held` does one: the unfinished one at the end, which adds to the sums' gradient in place of the
memory's, or the first, which takes along the sums from before the call. A loop with those cases in it and waiting
intermediates need three times the local memory. U1ᵀ and U2 lie upright, [C, D], as W1ᵀ and W2 do in the forward pass.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_handed_on import load_folded, load_own, load_whole, store_own
from fastweight.ops.ttt.kernels_mlp_held import load_memory, store_memory
from fastweight.ops.ttt.kernels_mlp_held_backward import inner_step_backward
from fastweight.ops.ttt.kernels_shared import (
    load_learning,
    load_tile,
    load_vector,
    rows_of,
    span_of,
    store_tile,
    store_vector,
)


@triton.jit
def walk_one(
    c, place, carry, totals, tokens, made, read, left, span, norm, num_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, UNFINISHED: tl.constexpr,
):  # fmt: skip
    """carry (U1ᵀ, u1, U2, u2) and totals (of dγ, dβ and λ's factors) before mini-batch c from those after it.

    tokens: q, k, v, rate, flags. made: what `mlp_replay_held` left, read: what `mlp_reads_held` left. left: where dv,
    drate, `pulled` and dz1 go. span: start, length, phase of the sequence, its head, heads. norm: γ, β, τ_last.
    """
    one, bias1, two, bias2 = carry
    gammas, betas, lasts, last1 = totals
    q, k, v, rate, flags = tokens
    seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends = made
    d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2 = read
    dv, drate, pulled, d_z1 = left
    start, length, phase, h, H = span
    gamma, beta, last = norm
    i = tl.arange(0, BLOCK_K)
    here = i < CHUNK
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
    counts = 0.0 if UNFINISHED else tl.where(refused, 0.0, 1.0)
    scale = 1.0 if UNFINISHED else -last * counts
    u_one, u_two = one.to(keys.dtype), two.to(keys.dtype)
    slope = load_folded(slopes, place, BLOCK_K, WHOLE, WARPS).to(tl.float32)
    pull1 = tl.dot(keys, tl.trans(u_one)) + bias1[None, :]
    forced = (pull1 * slope).to(keys.dtype)
    # dz1 and dE as far as they are known: what waits in registers until then would not fit there.
    bend = load_folded(bends, place, BLOCK_K, WHOLE, WARPS).to(tl.float32)
    wide1 = load_folded(below1, place, BLOCK_K, WHOLE, WARPS).to(tl.float32) + scale * pull1 * bend
    d_error = load_folded(errors, place, BLOCK_K, WHOLE, WARPS).to(tl.float32) + scale * forced.to(tl.float32)
    d_error = d_error.to(keys.dtype)
    pull2 = tl.dot(load_own(xs, place, i, CHUNK, BLOCK_K, C, WHOLE), u_two) + bias2[None, :]
    pull_key = tl.dot(load_own(writes1, place, i, CHUNK, BLOCK_K, C, WHOLE), u_one)
    grad2 = load_folded(grads2, place, BLOCK_K, BLOCK_D, WARPS)
    write2 = (rates[:, None] * grad2).to(keys.dtype)
    lasts += counts * (keys.to(tl.float32) * pull_key + pull2 * write2.to(tl.float32))
    second = load_whole(seconds, place, D, BLOCK_D, C, WHOLE)
    pull2_all = tl.dot(forced, tl.trans(second), pull2)
    d_write2 = load_folded(d_writes2, place, BLOCK_K, BLOCK_D, WARPS) + scale * pull2_all
    unit = load_folded(units, place, BLOCK_K, BLOCK_D, WARPS)
    # The condition always holds: it keeps the compiler from loading for this product ahead of those above.
    if num_tokens > -1:
        two = tl.dot(tl.trans(d_error), write2, two)
    gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
    at = statistics + place * (CHUNK * 8) + i * 8
    found = (
        tl.load(at, mask=here, other=0.0), tl.load(at + 1, mask=here, other=0.0),
        tl.load(at + 2, mask=here, other=0.0), tl.load(at + 3, mask=here, other=0.0),
        tl.load(at + 4, mask=here, other=0.0),
    )  # fmt: skip
    wide, du, d_rate = inner_step_backward(d_write2, rates, unit, grad2, gamma * gap, gamma, found, D, BLOCK_D)
    tl.store(drate + rows, tl.where(kept, d_rate, 0.0), mask=inside)
    dz2 = wide.to(keys.dtype)
    store_tile(dv, -gamma * du, rows, inside, D, BLOCK_D)
    store_own(pulled, scale * pull_key + gamma * du, place, i, CHUNK, D, BLOCK_D)
    gammas += du * (2.0 * unit * gamma + gap)
    betas += du * gamma
    last1 += counts * bias1 * load_vector(totals1, place, C, WHOLE)
    d_x = tl.dot((scale * write2.to(tl.float32)).to(keys.dtype), tl.trans(u_two))
    d_x = tl.dot(dz2, second, d_x)
    wide1 += d_x * load_folded(slopes, place, BLOCK_K, WHOLE, WARPS).to(tl.float32)
    dz1 = wide1.to(keys.dtype)
    store_own(d_z1, dz1, place, i, CHUNK, C, WHOLE)
    queries = load_tile(q, rows, inside, D, BLOCK_D)
    d_read = load_own(d_reads, place, i, CHUNK, BLOCK_K, D, BLOCK_D)
    one = tl.dot(tl.trans(load_own(d_middles, place, i, CHUNK, BLOCK_K, C, WHOLE)), queries, one)
    two = tl.dot(tl.trans(load_own(actives, place, i, CHUNK, BLOCK_K, C, WHOLE)), d_read, two)
    two = tl.dot(tl.trans(load_own(xs, place, i, CHUNK, BLOCK_K, C, WHOLE)), dz2, two)
    one = tl.dot(tl.trans(dz1), keys, one)
    bias1 += load_vector(middles1, place, C, WHOLE) + tl.sum(wide1, 0)
    bias2 += load_vector(reads2, place, D, BLOCK_D) + tl.sum(wide, 0)
    return (one, bias1, two, bias2), (gammas, betas, lasts, last1)


@triton.jit
def no_totals(BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    zeros = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    return zeros, zeros, zeros, tl.zeros([WHOLE], tl.float32)


@triton.jit
def add_totals(totals, opening, dgamma, dbeta, dlast, pid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add to dγ and dβ [N, H, D] and to that of τ_last [N, H]. opening: what the sums add to the last."""
    gammas, betas, lasts, last1 = totals
    store_vector(dgamma, load_vector(dgamma, pid, D, BLOCK_D) + tl.sum(gammas, 0), pid, D, BLOCK_D)
    store_vector(dbeta, load_vector(dbeta, pid, D, BLOCK_D) + tl.sum(betas, 0), pid, D, BLOCK_D)
    d_last = opening + tl.sum(tl.sum(lasts, 1)) + tl.sum(last1)
    tl.store(dlast + pid, tl.load(dlast + pid) - d_last)


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "to_sums", "packed"])
def mlp_walk_held(
    q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, base,
    seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends,
    d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2, pulled, d_z1,
    ds1_out, dt1_out, ds2_out, dt2_out, dv, drate, dlast, dgamma, dbeta,
    dw1, db1, dw2, db2, ds1, dt1, ds2, dt2, num_tokens, first, stop, to_sums, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, WARPS: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Whole mini-batches stop − 1 … first of each sequence, backwards, but not its first one
    if that began before the call or a gradient goes to the sums (to_sums).

    In place: dw1, db1, dw2, db2 (the gradient of the memory after these mini-batches, then before them), dlast [N, H]
    (of τ_last), dgamma, dbeta [N, H, D] (added to). Written: dv, drate, dz1 in q's dtype, and in `pulled` what of dk is
    known here [·, CHUNK, D].
    """
    pid = tl.program_id(0)
    n, h = pid // H, pid % H
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    special = (phase > 0) | (to_sums > 0)
    lowest, above = tl.maximum(first, tl.where(special, 1, 0)), tl.minimum(stop, (phase + length) // CHUNK)
    if lowest >= above:
        return
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    norm = (gamma, beta, tl.load(tau + CHUNK - 1).to(tl.float32))
    tokens, left, span = (q, k, v, rate, flags), (dv, drate, pulled, d_z1), (start, length, phase, h, H)
    made = (seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends)
    read = (d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2)
    carry = load_memory(dw1, db1, dw2, db2, pid, D, BLOCK_D, C, WHOLE, True)
    totals, stretch = no_totals(BLOCK_K, BLOCK_D, WHOLE), tl.load(base + n).to(tl.int64)
    for back in range(above - lowest):
        c = above - 1 - back
        place = (stretch * EVERY + c - first) * H + h
        carry, totals = walk_one(
            c, place, carry, totals, tokens, made, read, left, span, norm, num_tokens,
            D, BLOCK_D, C, WHOLE, CHUNK, BLOCK_K, WARPS, False,
        )  # fmt: skip
    store_memory(dw1, db1, dw2, db2, carry[0], carry[1], carry[2], carry[3], pid, D, BLOCK_D, C, WHOLE, True)
    add_totals(totals, 0.0, dgamma, dbeta, dlast, pid, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "to_sums", "packed"])
def mlp_end_held(
    q, k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags, base,
    seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends,
    d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2, pulled, d_z1,
    ds1_out, dt1_out, ds2_out, dt2_out, dv, drate, dlast, dgamma, dbeta,
    dw1, db1, dw2, db2, ds1, dt1, ds2, dt2, num_tokens, first, stop, to_sums, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, WARPS: tl.constexpr,
    UNFINISHED: tl.constexpr,
):  # fmt: skip
    """As `mlp_walk_held` for one mini-batch of each sequence: its unfinished one, if there is one and it is among first
    … stop − 1, or its first one, if that is whole and `mlp_walk_held` left it out. With mini-batch 0 ds1 … , the
    gradient of the sums, is added to."""
    pid = tl.program_id(0)
    n, h = pid // H, pid % H
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    whole = (phase + length) // CHUNK
    if UNFINISHED:
        c = whole
        absent = (whole * CHUNK == phase + length) | (c < first) | (c >= stop)
    else:
        c = 0
        absent = (whole == 0) | (first > 0) | ((phase == 0) & (to_sums == 0))
    if absent:
        return
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    if UNFINISHED:
        # The sums' gradient takes the place of the memory's, which is added to it again below.
        one, bias1, two, bias2 = load_memory(ds1_out, dt1_out, ds2_out, dt2_out, pid, D, BLOCK_D, C, WHOLE, True)
    else:
        one, bias1, two, bias2 = load_memory(dw1, db1, dw2, db2, pid, D, BLOCK_D, C, WHOLE, True)
    opening = 0.0
    if c == 0:
        rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
        refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
        s_one, s_bias1, s_two, s_bias2 = load_memory(s1, t1, s2, t2, pid, D, BLOCK_D, C, WHOLE, True)
        if not UNFINISHED:
            dot = tl.sum(tl.sum(one * s_one + two * s_two, 1) + bias1 * s_bias1) + tl.sum(bias2 * s_bias2)
            opening = tl.where(refused, 0.0, dot)
        scale = 1.0 if UNFINISHED else tl.where(refused, 0.0, -last)
        s_one, s_bias1, s_two, s_bias2 = load_memory(ds1, dt1, ds2, dt2, pid, D, BLOCK_D, C, WHOLE, True)
        store_memory(
            ds1, dt1, ds2, dt2, s_one + scale * one, s_bias1 + scale * bias1, s_two + scale * two,
            s_bias2 + scale * bias2, pid, D, BLOCK_D, C, WHOLE, True
        )  # fmt: skip
    tokens, left, span = (q, k, v, rate, flags), (dv, drate, pulled, d_z1), (start, length, phase, h, H)
    made = (seconds, totals1, units, grads2, statistics, xs, writes1, slopes, bends)
    read = (d_reads, d_writes2, actives, d_middles, below1, errors, middles1, reads2)
    place = (tl.load(base + n).to(tl.int64) * EVERY + c - first) * H + h
    carry, totals = walk_one(
        c, place, (one, bias1, two, bias2), no_totals(BLOCK_K, BLOCK_D, WHOLE), tokens, made, read, left, span,
        (gamma, beta, last), num_tokens, D, BLOCK_D, C, WHOLE, CHUNK, BLOCK_K, WARPS,
        UNFINISHED,
    )  # fmt: skip
    one, bias1, two, bias2 = carry
    if UNFINISHED:
        more1, more_bias1, more2, more_bias2 = load_memory(dw1, db1, dw2, db2, pid, D, BLOCK_D, C, WHOLE, True)
        less1, less_bias1, less2, less_bias2 = load_memory(
            ds1_out, dt1_out, ds2_out, dt2_out, pid, D, BLOCK_D, C, WHOLE, True
        )
        one, two = one + (more1 - less1), two + (more2 - less2)
        bias1, bias2 = bias1 + (more_bias1 - less_bias1), bias2 + (more_bias2 - less_bias2)
    store_memory(dw1, db1, dw2, db2, one, bias1, two, bias2, pid, D, BLOCK_D, C, WHOLE, True)
    add_totals(totals, opening, dgamma, dbeta, dlast, pid, D, BLOCK_D)
