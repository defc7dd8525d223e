# pyright: reportGeneralTypeIssues=false
"""TTT-Linear on a GPU: one program reads one sequence with one head; its memory W, b stays in registers.

Forward, per mini-batch (legend in kernels_shared.py):
z = k W + b; P = r G(z); T = tril(q kᵀ + 1); read = q W + b − τ T P − τ (q S + s); y = q + LN(read);
Σ_W = S + kᵀ P, Σ_b = s + Σ_j P_j; W' = W − τ_last Σ_W, b' = b − τ_last Σ_b. (S, s) count in the first mini-batch only.
Every few mini-batches W, b are kept; the backward pass (kernels_linear_backward.py) begins by replaying all stretches
between them side by side, which leaves W, b of every mini-batch.

Values that are not finite are not looked for until one shows in the final memory; then the program reads once more,
with checks, which mark the tokens and updates to leave out. The other kernels obey the marks.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_shared import (
    causal,
    count_not_finite,
    load_learning,
    load_matrix,
    load_tile,
    load_vector,
    not_finite,
    rows_of,
    span_of,
    standardised,
    store_matrix,
    store_tile,
    store_vector,
    within,
)


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def row_means(a, b, D: tl.constexpr):
    """Means over the D columns [·, 1] of two tiles: sums made together meet at one barrier, not at one each."""
    a, b = tl.reduce((a, b), 1, _add2)
    return (a * (1.0 / D))[:, None], (b * (1.0 / D))[:, None]


@triton.jit
def _unit_and_gap(k, v, w, b, eps, beta, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """unit and 1 / s under w (in the products' dtype) and b [1, D], and β − Y."""
    unit, inverse = standardised(tl.dot(k, w, input_precision=PRECISION) + b, eps, D, BLOCK_D)
    return unit, inverse, beta - (v.to(tl.float32) - k.to(tl.float32))


@triton.jit
def _gradient(unit, inverse, gap, gamma, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """G."""
    u = within((unit * gamma + gap) * gamma, D, BLOCK_D)
    mean, share = row_means(u, u * unit, D)
    return within((u - mean - unit * share) * inverse, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "packed", "keep"])
def linear_forward(
    q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, cu_seqlens,
    y, w_out, b_out, s_out, sb_out, flags, kept_w, kept_b, num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, keep, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. w0, s0 [N, H, D, D], b0, sb0 [N, H, D]; flags [tokens, H]; y like q.

    keep: W, b at the start of every EVERY-th mini-batch go to kept_w, kept_b [slots, H, …], the slot of sequence n's
    first one being start // (CHUNK · EVERY) + 2 n, which leaves room for any phase.
    """
    suspects = _read_all(
        q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, cu_seqlens, y, w_out, b_out, s_out, sb_out,
        flags, kept_w, kept_b, num_tokens, eps, H, D, BLOCK_D, CHUNK, BLOCK_K, EVERY, packed, keep, PRECISION, False,
    )  # fmt: skip
    if suspects > 0:
        tl.debug_barrier()  # what was written is written again, by other threads maybe
        _read_all(
            q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, cu_seqlens, y, w_out, b_out, s_out,
            sb_out, flags, kept_w, kept_b, num_tokens, eps, H, D, BLOCK_D, CHUNK, BLOCK_K, EVERY, packed, keep,
            PRECISION, True,
        )  # fmt: skip


@triton.jit
def _read_all(
    q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, cu_seqlens,
    y, w_out, b_out, s_out, sb_out, flags, kept_w, kept_b, num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, keep, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """How much of the new memory and sums is not finite. GUARD: look at everything, leave faults out and mark them."""
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    w, b = load_matrix(w0, pid, D, BLOCK_D), load_vector(b0, pid, D, BLOCK_D)
    slot = start // (CHUNK * EVERY) + 2 * n
    faults = 0
    for c in range((phase + length + CHUNK - 1) // CHUNK):
        if (keep > 0) & (c % EVERY == 0):
            index = (slot + c // EVERY) * H + h
            store_matrix(kept_w, w, index, D, BLOCK_D)
            store_vector(kept_b, b, index, D, BLOCK_D)
        rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
        queries, keys = load_tile(q, rows, inside, D, BLOCK_D), load_tile(k, rows, inside, D, BLOCK_D)
        values = load_tile(v, rows, inside, D, BLOCK_D)
        rates = tl.load(rate + rows, mask=inside, other=0.0).to(tl.float32)
        if GUARD:
            silent = not_finite(keys.to(tl.float32)) + not_finite(values.to(tl.float32)) + not_finite(rates[:, None])
            keys = tl.where(silent[:, None] > 0, 0.0, keys).to(queries.dtype)
            values = tl.where(silent[:, None] > 0, 0.0, values).to(queries.dtype)
            rates = tl.where(silent > 0, 0.0, rates)
        product_w = w.to(queries.dtype)
        unit, inverse, gap = _unit_and_gap(keys, values, product_w, b[None, :], eps, beta, D, BLOCK_D, PRECISION)
        wide_write = rates[:, None] * _gradient(unit, inverse, gap, gamma, D, BLOCK_D)
        write = wide_write.to(queries.dtype)
        if GUARD:
            # The largest entry of the outer product; the bias is written with x = 1.
            reach = tl.maximum(tl.max(tl.abs(keys.to(tl.float32)), 1), 1.0)[:, None]
            silent += not_finite(write.to(tl.float32) * reach)
            wide_write = tl.where(silent[:, None] > 0, 0.0, wide_write)
            write = wide_write.to(queries.dtype)
        scores = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K) * taus
        read = tl.dot(queries, product_w, input_precision=PRECISION) + b[None, :]
        read -= tl.dot(scores.to(queries.dtype), write, input_precision=PRECISION)
        total = tl.dot(tl.trans(keys), write, input_precision=PRECISION)
        total_b = tl.sum(wide_write, 0)
        if c == 0:
            earlier, earlier_b = load_matrix(s0, pid, D, BLOCK_D), load_vector(sb0, pid, D, BLOCK_D)
            before = tl.dot(queries, earlier.to(queries.dtype), input_precision=PRECISION) + earlier_b[None, :]
            read -= taus * before
            total += earlier
            total_b += earlier_b
        unit = standardised(read, eps, D, BLOCK_D)[0]
        store_tile(y, queries.to(tl.float32) + unit * gamma + beta, rows, inside, D, BLOCK_D)
        full = (c + 1) * CHUNK <= phase + length
        if full == 0:
            store_matrix(s_out, total, pid, D, BLOCK_D)
            store_vector(sb_out, total_b, pid, D, BLOCK_D)
            faults += count_not_finite(total) + count_not_finite(total_b)
        new_w, new_b = tl.where(full, w - last * total, w), tl.where(full, b - last * total_b, b)
        if GUARD:
            sound = count_not_finite(new_w) + count_not_finite(new_b) == 0
            new_w, new_b = tl.where(sound, new_w, w), tl.where(sound, new_b, b)
            flag = tl.where(silent > 0, 1, 0) + tl.where((i == CHUNK - 1) & (sound == 0), 2, 0)
            tl.store(flags + rows, flag.to(flags.dtype.element_ty), mask=inside)
        else:
            tl.store(flags + rows, tl.zeros([BLOCK_K], flags.dtype.element_ty), mask=inside)
        w, b = new_w, new_b
    if (phase + length) % CHUNK == 0:
        store_matrix(s_out, tl.zeros_like(w), pid, D, BLOCK_D)
        store_vector(sb_out, tl.zeros_like(b), pid, D, BLOCK_D)
    store_matrix(w_out, w, pid, D, BLOCK_D)
    store_vector(b_out, b, pid, D, BLOCK_D)
    return faults + count_not_finite(w) + count_not_finite(b)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def linear_replay(
    k, v, rate, tau, ln_weight, ln_bias, s0, sb0, position, cu_seqlens, flags, kept_w, kept_b, owner, base,
    all_w, all_b, units, rows_stats, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (stretches, heads). From the kept W, b to those of each mini-batch: all_w in q's dtype, all_b float32.

    A stretch is EVERY mini-batches. owner: [stretches] its sequence (num_sequences for none); base: [N] the first
    stretch of each sequence, which begins at mini-batch `first`. all_w: [stretches · EVERY, H, D, D]. Also written:
    units [·, H, CHUNK, D] and, for each token, 1 / s and the means over D of u, u unit, γ² unit and γ² unit²:
    rows_stats [·, H, 5, CHUNK], float32.
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
    index = (start // (CHUNK * EVERY) + 2 * n + begin // EVERY) * H + h
    w, b = load_matrix(kept_w, index, D, BLOCK_D), load_vector(kept_b, index, D, BLOCK_D)
    for c in range(begin, end):
        rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
        keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
        product_w = w.to(keys.dtype)
        place = (stretch * EVERY + c - begin).to(tl.int64) * H + h
        store_matrix(all_w, product_w, place, D, BLOCK_D)
        store_vector(all_b, b, place, D, BLOCK_D)
        unit, inverse, gap = _unit_and_gap(keys, values, product_w, b[None, :], eps, beta, D, BLOCK_D, PRECISION)
        i = tl.arange(0, BLOCK_K)
        store_tile(units, unit, place * CHUNK + i, i < CHUNK, D, BLOCK_D)
        u, bent = within((unit * gamma + gap) * gamma, D, BLOCK_D), gamma * gamma * unit
        mean, share, first_moment, second_moment = tl.reduce((u, u * unit, bent, bent * unit), 1, _add4)
        mean, share = mean * (1.0 / D), share * (1.0 / D)
        store_vector(rows_stats, tl.reshape(inverse, [BLOCK_K]), place * 5, CHUNK, BLOCK_K)
        store_vector(rows_stats, mean, place * 5 + 1, CHUNK, BLOCK_K)
        store_vector(rows_stats, share, place * 5 + 2, CHUNK, BLOCK_K)
        store_vector(rows_stats, first_moment * (1.0 / D), place * 5 + 3, CHUNK, BLOCK_K)
        store_vector(rows_stats, second_moment * (1.0 / D), place * 5 + 4, CHUNK, BLOCK_K)
        grad = within((u - mean[:, None] - unit * share[:, None]) * inverse, D, BLOCK_D)
        wide_write = rates[:, None] * grad
        write = wide_write.to(keys.dtype)
        total, total_b = tl.dot(tl.trans(keys), write, input_precision=PRECISION), tl.sum(wide_write, 0)
        if c == 0:
            total += load_matrix(s0, n * H + h, D, BLOCK_D)
            total_b += load_vector(sb0, n * H + h, D, BLOCK_D)
        w, b = tl.where(refused, w, w - last * total), tl.where(refused, b, b - last * total_b)
