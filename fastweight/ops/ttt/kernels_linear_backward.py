# pyright: reportGeneralTypeIssues=false
"""TTT-Linear on a GPU, backward, in two kernels (W, b, unit of every mini-batch were replayed: kernels_linear.py).

`linear_reads`, one program per mini-batch and head, all at once: what follows from dy alone.
d read through LN; dT = −τ tril(d read Pᵀ); dP = −(τ T)ᵀ d read; dq = dy + d read Wᵀ + dT k − τ d read Sᵀ;
dk = dTᵀ q; dS = −(τ q)ᵀ d read; dτ = −Σ_j tril(d read Pᵀ) T − Σ_D d read (q S + s).
`linear_backward`, one program per sequence and head, from the last mini-batch to the first with dW, db in registers:
dP += λ (k U + ub); dr = Σ_D dP G; dG = r dP; dk += λ P Uᵀ + dz Wᵀ − dY; dv = dY; dτ_last −= Σ (W'-gradient) Σ_W;
dW = dW' + qᵀ d read + kᵀ dz; dS += λ U.
Where the mini-batch ends U = dW' and λ = −τ_last (0 if its update was refused), else U is the gradient of the sum that
is left behind and λ = 1. dz, dY come from dG by the derivative in kernels_shared.py. All means that it needs follow
from five sums over D, of dP, dP unit, dP u, γ² dP and γ² dP unit, and from what was replayed: one wait for them in all.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_linear import row_means
from fastweight.ops.ttt.kernels_shared import (
    causal,
    load_learning,
    load_matrix,
    load_tile,
    load_vector,
    rows_of,
    span_of,
    standardised,
    store_matrix,
    store_tile,
    store_vector,
    within,
)


@triton.jit
def _add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4


@triton.jit
def _store_shared(shared, index, dtau, dgamma, dbeta, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """One row of shared [·, CHUNK + 2 D]."""
    to, i, d = shared + index.to(tl.int64) * (CHUNK + 2 * D), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    tl.store(to + i, dtau, mask=i < CHUNK)
    tl.store(to + CHUNK + d, dgamma, mask=d < D)
    tl.store(to + CHUNK + D + d, dbeta, mask=d < D)


@triton.jit
def _sum_shared(shared, start, every, number, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """The sums over `number` rows of `_store_shared`, from `start` on, `every` apart."""
    i, d = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    dtau = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
    dgamma, dbeta = tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for row in range(0, number, BLOCK_K):
        there = (row + i < number)[:, None]
        at = (shared + (start + (row + i) * every) * (CHUNK + 2 * D))[:, None]
        dtau += tl.load(at + i[None, :], mask=there & (i < CHUNK)[None, :], other=0.0)
        dgamma += tl.load(at + CHUNK + d[None, :], mask=there & (d < D)[None, :], other=0.0)
        dbeta += tl.load(at + CHUNK + D + d[None, :], mask=there & (d < D)[None, :], other=0.0)
    return tl.sum(dtau, 0), tl.sum(dgamma, 0), tl.sum(dbeta, 0)


@triton.jit
def _write_of(unit, gap, gamma, mean, share, inverse, rates, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """u, G and r G from what was replayed: unit, and 1 / s and the means of u and u unit of each token."""
    u = within((unit * gamma + gap) * gamma, D, BLOCK_D)
    grad = within((u - mean[:, None] - unit * share[:, None]) * inverse[:, None], D, BLOCK_D)
    return u, grad, rates[:, None] * grad


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def linear_reads(
    dy, q, k, v, rate, tau, ln_weight, ln_bias, s0, sb0, position, cu_seqlens, flags, owner, base,
    all_w, all_b, units, rows_stats, d_reads, reads_shared, dq, dk, dv, ds, dsb, num_tokens, num_sequences, first,
    eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: places · heads, a place being one mini-batch: stretches · EVERY of them (see `linear_replay`).

    Written: d_reads [places, H, CHUNK, D] in q's dtype; reads_shared [places, H, CHUNK + 2 D], gradients of τ, γ, β;
    for the tokens dq, and in dk, dv what `linear_backward` adds to (dTᵀ q, dP); ds, dsb with a sequence's first
    mini-batch.
    """
    pid, i = tl.program_id(0), tl.arange(0, BLOCK_K)
    at, h = pid // H, pid % H
    n = tl.load(owner + at // EVERY)
    there = n < num_sequences
    n = tl.where(there, n, 0)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    c = first + (at // EVERY - tl.load(base + n)) * EVERY + at % EVERY
    if (there == 0) | (c * CHUNK >= phase + length):
        return
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
    own, here, stats = pid.to(tl.int64) * CHUNK + i, i < CHUNK, pid.to(tl.int64) * 5
    keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
    queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D).to(tl.float32)
    gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
    inverse = load_vector(rows_stats, stats, CHUNK, BLOCK_K)
    mean = load_vector(rows_stats, stats + 1, CHUNK, BLOCK_K)
    share = load_vector(rows_stats, stats + 2, CHUNK, BLOCK_K)
    unit = load_tile(units, own, here, D, BLOCK_D)
    write = _write_of(unit, gap, gamma, mean, share, inverse, rates, D, BLOCK_D)[2].to(keys.dtype)
    w = load_matrix(all_w, pid, D, BLOCK_D)
    raw = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K)
    scores = (raw * taus).to(keys.dtype)
    read = tl.dot(queries, w, input_precision=PRECISION) + load_vector(all_b, pid, D, BLOCK_D)[None, :]
    read -= tl.dot(scores, write, input_precision=PRECISION)
    before = tl.zeros_like(read)
    if c == 0:
        earlier = load_matrix(s0, n * H + h, D, BLOCK_D).to(keys.dtype)
        before = tl.dot(queries, earlier, input_precision=PRECISION)
        before += load_vector(sb0, n * H + h, D, BLOCK_D)[None, :]
        read -= taus * before
    unit, inverse = standardised(read, eps, D, BLOCK_D)
    back = given * gamma
    mean, share = row_means(back, back * unit, D)
    wide = within((back - mean - unit * share) * inverse, D, BLOCK_D)
    d_read = wide.to(keys.dtype)
    store_tile(d_reads, d_read, own, here, D, BLOCK_D)
    d_raw = causal(tl.dot(d_read, tl.trans(write), input_precision=PRECISION), BLOCK_K)
    d_tau = -tl.sum(d_raw * raw, 1) - tl.sum(wide * before, 1)
    _store_shared(reads_shared, pid, d_tau, tl.sum(given * unit, 0), tl.sum(given, 0), D, BLOCK_D, CHUNK, BLOCK_K)
    d_raw = (d_raw * -taus).to(keys.dtype)
    store_tile(dv, -tl.dot(tl.trans(scores), d_read, input_precision=PRECISION), rows, inside, D, BLOCK_D)
    store_tile(dk, tl.dot(tl.trans(d_raw), queries, input_precision=PRECISION), rows, inside, D, BLOCK_D)
    d_query = given + tl.dot(d_read, tl.trans(w), input_precision=PRECISION)
    d_query += tl.dot(d_raw, keys, input_precision=PRECISION)
    if c == 0:
        scaled, earlier = (taus * wide).to(keys.dtype), load_matrix(s0, n * H + h, D, BLOCK_D).to(keys.dtype)
        d_query -= tl.dot(scaled, tl.trans(earlier), input_precision=PRECISION)
        store_matrix(
            ds, -tl.dot(tl.trans(queries), scaled, input_precision=PRECISION), n * H + h, D, BLOCK_D
        )  # fmt: skip
        store_vector(dsb, -tl.sum(taus * wide, 0), n * H + h, D, BLOCK_D)
    store_tile(dq, d_query, rows, inside, D, BLOCK_D)


@triton.jit
def _first_update(flags, start, length, phase, h, H, last, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """λ of the first mini-batch, and whether it was finished and applied."""
    rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
    refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
    full = phase + length >= CHUNK
    return tl.where(full, tl.where(refused, 0.0, -last), 1.0), full & (refused == 0)


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "turn", "memory_given", "sums_given", "packed"])
def linear_backward(
    q, k, v, rate, tau, ln_weight, ln_bias, s0, sb0, position, cu_seqlens, flags, base,
    all_w, all_b, units, rows_stats, d_reads, reads_shared, dw_out, db_out, ds_out, dsb_out,
    dk, dv, drate, shared, dw, db, ds, dsb, num_tokens, first, stop, turn, memory_given, sums_given, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Mini-batches stop − 1 … first of each sequence, backwards.

    dw_out, db_out: the gradient of the memory after these mini-batches, ds_out, dsb_out that of the sums that are left
    behind, not read unless memory_given, sums_given (zero then). Written: drate; dw, db, the gradient of the memory
    before; shared [·, H, CHUNK + 2 D], from row turn · N on: gradients of τ, γ, β, those of reads_shared included.
    Completed: dk, dv; with the first mini-batch ds, dsb.
    """
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    square = gamma * gamma
    mean_square = tl.sum(square) * (1.0 / D)
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    end = tl.minimum(stop, (phase + length + CHUNK - 1) // CHUNK)
    grad_w, grad_b = load_matrix(dw_out, pid, D, BLOCK_D, memory_given > 0), tl.zeros([BLOCK_D], tl.float32)
    if memory_given > 0:
        grad_b = load_vector(db_out, pid, D, BLOCK_D)
    # U of the first mini-batch to come. Only the last one, the first to come here, can be unfinished.
    product, after_b = grad_w.to(q.dtype.element_ty), grad_b
    if end * CHUNK > phase + length:
        product = load_matrix(ds_out, pid, D, BLOCK_D, sums_given > 0).to(q.dtype.element_ty)
        after_b = tl.zeros([BLOCK_D], tl.float32)
        if sums_given > 0:
            after_b = load_vector(dsb_out, pid, D, BLOCK_D)
    grad_gamma = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_u = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_last = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    place = tl.load(base + n).to(tl.int64) * EVERY
    for back in range(end - first):
        c = end - 1 - back
        rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
        keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
        queries = load_tile(q, rows, inside, D, BLOCK_D)
        at = (place + c - first) * H + h
        own, here = at * CHUNK + i, i < CHUNK
        unit, d_read = load_tile(units, own, here, D, BLOCK_D), load_tile(d_reads, own, here, D, BLOCK_D)
        w = load_matrix(all_w, at, D, BLOCK_D)
        inverse, mean = (
            load_vector(rows_stats, at * 5, CHUNK, BLOCK_K), load_vector(rows_stats, at * 5 + 1, CHUNK, BLOCK_K)
        )  # fmt: skip
        share = load_vector(rows_stats, at * 5 + 2, CHUNK, BLOCK_K)
        first_moment = load_vector(rows_stats, at * 5 + 3, CHUNK, BLOCK_K)
        second_moment = load_vector(rows_stats, at * 5 + 4, CHUNK, BLOCK_K)
        full = (c + 1) * CHUNK <= phase + length
        applied = full & (refused == 0)
        scale = tl.where(full, tl.where(refused, 0.0, -last), 1.0)
        if c == 0:
            # Kept for what came in with the call; nobody needs this W any more once every thread has read it.
            tl.debug_barrier()
            store_matrix(all_w, product, at, D, BLOCK_D)
            store_vector(all_b, after_b, at, D, BLOCK_D)
        grad_w = tl.dot(tl.trans(queries), d_read, grad_w, input_precision=PRECISION)
        gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
        u, grad, wide_write = _write_of(unit, gap, gamma, mean, share, inverse, rates, D, BLOCK_D)
        write = wide_write.to(keys.dtype)
        pull = tl.dot(keys, product, input_precision=PRECISION) + after_b[None, :]
        grad_last += tl.where(applied, pull * wide_write, 0.0)
        d_write = load_tile(dv, rows, inside, D, BLOCK_D).to(tl.float32) + scale * pull
        bent = square * d_write
        plain, along, along_u, bent_sum, bent_along = tl.reduce(
            (d_write, d_write * unit, d_write * u, bent, bent * unit), 1, _add5
        )
        d_rate = inverse * (along_u - mean * plain - share * along)
        tl.store(drate + rows, tl.where(kept, d_rate, 0.0), mask=inside)
        # The inner gradient's derivative: w = factor · dP.
        factor = rates * inverse
        each = factor * (1.0 / D)
        mean_w, shared_w = plain * each, along * each
        mean_n = bent_sum * each - mean_w * (mean_square + share) - shared_w * (first_moment + mean)
        along_n = bent_along * each - mean_w * first_moment - shared_w * (second_moment + 2.0 * share)
        along_n += rates * d_rate * (1.0 / D)
        wide_w = factor[:, None] * d_write
        du = within(wide_w - mean_w[:, None] - unit * shared_w[:, None], D, BLOCK_D)
        n_tile = square * du - share[:, None] * wide_w - u * shared_w[:, None]
        dz = within((n_tile - mean_n[:, None] - unit * along_n[:, None]) * inverse[:, None], D, BLOCK_D)
        product_z = dz.to(keys.dtype)
        grad_w = tl.dot(tl.trans(keys), product_z, grad_w, input_precision=PRECISION)
        grad_b += tl.sum(dz + d_read.to(tl.float32), 0)
        grad_gamma += du * (2.0 * unit * gamma + gap)
        grad_u += du
        d_value = -gamma * du
        store_tile(dv, d_value, rows, inside, D, BLOCK_D)
        d_key = scale * tl.dot(write, tl.trans(product), input_precision=PRECISION) - d_value
        d_key += load_tile(dk, rows, inside, D, BLOCK_D).to(tl.float32)
        d_key += tl.dot(product_z, tl.trans(w), input_precision=PRECISION)
        store_tile(dk, d_key, rows, inside, D, BLOCK_D)
        product, after_b = grad_w.to(keys.dtype), grad_b
    store_matrix(dw, grad_w, pid, D, BLOCK_D)
    store_vector(db, grad_b, pid, D, BLOCK_D)
    d_last = tl.sum(grad_last)
    if first == 0:
        tl.debug_barrier()
        scale, applied = _first_update(flags, start, length, phase, h, H, last, CHUNK, BLOCK_K)
        after, after_b = load_matrix(all_w, place * H + h, D, BLOCK_D), load_vector(all_b, place * H + h, D, BLOCK_D)
        after = after.to(tl.float32)
        opened = tl.sum(after * load_matrix(s0, pid, D, BLOCK_D)) + tl.sum(after_b * load_vector(sb0, pid, D, BLOCK_D))
        d_last += tl.where(applied, opened, 0.0)
        store_matrix(ds, load_matrix(ds, pid, D, BLOCK_D) + scale * after, pid, D, BLOCK_D)
        store_vector(dsb, load_vector(dsb, pid, D, BLOCK_D) + scale * after_b, pid, D, BLOCK_D)
    d_tau, d_gamma, d_beta = _sum_shared(reads_shared, place * H + h, H, end - first, D, BLOCK_D, CHUNK, BLOCK_K)
    d_tau += tl.where(i == CHUNK - 1, -d_last, 0.0)
    d_gamma += tl.sum(grad_gamma, 0)
    d_beta += tl.sum(grad_u, 0) * load_vector(ln_weight, h, D, BLOCK_D)
    to = turn * tl.num_programs(0) + pid
    _store_shared(shared, to, d_tau, d_gamma, d_beta, D, BLOCK_D, CHUNK, BLOCK_K)
