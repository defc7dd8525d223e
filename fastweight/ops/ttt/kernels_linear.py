# pyright: reportGeneralTypeIssues=false
"""TTT-Linear on a GPU: one program reads one sequence with one head; its memory W, b stays in registers.

Forward, per mini-batch (legend in kernels_shared.py):
z = k W + b; P = r G(z); T = tril(q kᵀ + 1); read = q W + b − τ T P − τ (q S + s); y = q + LN(read);
Σ_W = S + kᵀ P, Σ_b = s + Σ_j P_j; W' = W − τ_last Σ_W, b' = b − τ_last Σ_b. (S, s) count in the first mini-batch only.
Every few mini-batches W, b are kept. The backward pass first replays all stretches between them side by side, which
leaves W, b of every mini-batch, then walks from the last mini-batch to the first with dW, db in registers:
d read through LN; dP = −(τ T)ᵀ d read + λ (k U + ub); dT = −τ tril(d read Pᵀ);
dq = dy + d read Wᵀ + dT k − τ d read Sᵀ; dk = dTᵀ q + λ P Uᵀ + dz Wᵀ − dY; dv = dY; dr = Σ_D dP G; dG = r dP;
dτ = −Σ_j tril(d read Pᵀ) T − Σ_D d read (q S + s); dτ_last −= Σ (W'-gradient) Σ_W;
dW = dW' + qᵀ d read + kᵀ dz; dS = λ U − (τ q)ᵀ d read.
Where the mini-batch ends U = dW' and λ = −τ_last (0 if its update was refused), else U is the gradient of the sum that
is left behind and λ = 1. dz, dY come from dG by the derivative in kernels_shared.py.

Values that are not finite are not looked for until one shows in the final memory; then the forward pass is repeated
with checks, which mark the tokens and updates to leave out. The other kernels obey the marks.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_shared import (
    causal,
    count_not_finite,
    inner_gradient,
    inner_gradient_backward,
    load_learning,
    load_matrix,
    load_tile,
    load_vector,
    norm_backward,
    not_finite,
    rows_of,
    span_of,
    standardised,
    store_matrix,
    store_tile,
    store_vector,
)


@triton.jit
def _gradient(k, v, w, b, eps, gamma, beta, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """G under w (in the products' dtype) and b [1, D], and what its derivative needs."""
    z = tl.dot(k, w, input_precision=PRECISION) + b
    unit, inverse = standardised(z, eps, D, BLOCK_D)
    gap = beta - (v.to(tl.float32) - k.to(tl.float32))
    grad, u = inner_gradient(unit, inverse, gap, gamma, D, BLOCK_D)
    return grad, unit, inverse, u, gap


@triton.jit(do_not_specialize=["num_tokens", "packed", "keep"])
def linear_forward(
    q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, cu_seqlens,
    y, w_out, b_out, s_out, sb_out, flags, suspects, kept_w, kept_b, kept_before,
    num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, keep, PRECISION: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. w0, s0 [N, H, D, D], b0, sb0 [N, H, D]; flags [tokens, H] zero; y like q.

    suspects: [N, H] int32, how much of the new memory is not finite. With GUARD (a second launch) only such programs
    run, now with checks that fill `flags` and leave faults out; without it there are none.
    keep: W, b at the start of every EVERY-th mini-batch go to kept_w, kept_b [slots, H, …], the slot of sequence n's
    first one being start // (CHUNK · EVERY) + 2 n, which leaves room for any phase; q S + s
    of its first mini-batch goes to kept_before [N, H, CHUNK, D].
    """
    pid = tl.program_id(0)
    if GUARD and tl.load(suspects + pid) == 0:
        return
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
        grad = _gradient(keys, values, product_w, b[None, :], eps, gamma, beta, D, BLOCK_D, PRECISION)[0]
        write = (rates[:, None] * grad).to(queries.dtype)
        if GUARD:
            # The largest entry of the outer product; the bias is written with x = 1.
            reach = tl.maximum(tl.max(tl.abs(keys.to(tl.float32)), 1), 1.0)[:, None]
            silent += not_finite(write.to(tl.float32) * reach)
            write = tl.where(silent[:, None] > 0, 0.0, write).to(queries.dtype)
        scores = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K) * taus
        read = tl.dot(queries, product_w, input_precision=PRECISION) + b[None, :]
        read -= tl.dot(scores.to(queries.dtype), write, input_precision=PRECISION)
        total = tl.dot(tl.trans(keys), write, input_precision=PRECISION)
        total_b = tl.sum(write.to(tl.float32), 0)
        if c == 0:
            earlier, earlier_b = load_matrix(s0, pid, D, BLOCK_D), load_vector(sb0, pid, D, BLOCK_D)
            before = tl.dot(queries, earlier.to(queries.dtype), input_precision=PRECISION) + earlier_b[None, :]
            read -= taus * before
            if keep > 0:
                store_tile(kept_before, before, pid.to(tl.int64) * CHUNK + i, i < CHUNK, D, BLOCK_D)
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
            tl.store(flags + rows, flag.to(tl.int8), mask=inside)
        w, b = new_w, new_b
    if (phase + length) % CHUNK == 0:
        store_matrix(s_out, tl.zeros_like(w), pid, D, BLOCK_D)
        store_vector(sb_out, tl.zeros_like(b), pid, D, BLOCK_D)
    store_matrix(w_out, w, pid, D, BLOCK_D)
    store_vector(b_out, b, pid, D, BLOCK_D)
    if GUARD == 0:
        tl.store(suspects + pid, faults + count_not_finite(w) + count_not_finite(b))


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def linear_replay(
    k, v, rate, tau, ln_weight, ln_bias, s0, sb0, position, cu_seqlens, flags, kept_w, kept_b, owner, base,
    all_w, all_b, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (stretches, heads). From the kept W, b to those of each mini-batch: all_w in q's dtype, all_b float32.

    A stretch is EVERY mini-batches. owner: [stretches] its sequence (num_sequences for none); base: [N] the first
    stretch of each sequence, which begins at mini-batch `first`. all_w: [stretches · EVERY, H, D, D].
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
        grad = _gradient(keys, values, product_w, b[None, :], eps, gamma, beta, D, BLOCK_D, PRECISION)[0]
        write = (rates[:, None] * grad).to(keys.dtype)
        total, total_b = tl.dot(tl.trans(keys), write, input_precision=PRECISION), tl.sum(write.to(tl.float32), 0)
        if c == 0:
            total += load_matrix(s0, n * H + h, D, BLOCK_D)
            total_b += load_vector(sb0, n * H + h, D, BLOCK_D)
        w, b = tl.where(refused, w, w - last * total), tl.where(refused, b, b - last * total_b)


@triton.jit(do_not_specialize=["num_tokens", "first", "stop", "packed"])
def linear_backward(
    dy, q, k, v, rate, tau, ln_weight, ln_bias, position, cu_seqlens, flags, all_w, all_b, base, kept_before,
    ds_out, dsb_out, dq, dk, dv, drate, dtau, dgamma, dbeta, dw, db, ds, dsb, d_before,
    num_tokens, first, stop, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Mini-batches stop − 1 … first of each sequence, backwards.

    In place: dw, db (the gradient of the memory after these mini-batches, then before them), dtau [N, H, CHUNK],
    dgamma, dbeta [N, H, D] (added to). Written: dq, dk, dv, drate for the tokens; with the first mini-batch, U and its
    bias to ds, dsb and τ d read to d_before [N, H, CHUNK, D]: what came in with the call is `linear_opening`'s.
    """
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    grad_w, grad_b = load_matrix(dw, pid, D, BLOCK_D), load_vector(db, pid, D, BLOCK_D)
    grad_gamma, grad_beta = load_vector(dgamma, pid, D, BLOCK_D), load_vector(dbeta, pid, D, BLOCK_D)
    grad_tau = load_vector(dtau, pid, CHUNK, BLOCK_K)
    end = tl.minimum(stop, (phase + length + CHUNK - 1) // CHUNK)
    place = tl.load(base + n).to(tl.int64) * EVERY
    for back in range(end - first):
        c = end - 1 - back
        rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
        keys, values, rates, kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
        queries, given = load_tile(q, rows, inside, D, BLOCK_D), load_tile(dy, rows, inside, D, BLOCK_D)
        given = given.to(tl.float32)
        at = (place + c - first) * H + h
        w = load_matrix(all_w, at, D, BLOCK_D)
        b = load_vector(all_b, at, D, BLOCK_D)[None, :]
        full = (c + 1) * CHUNK <= phase + length
        # The forward pass again.
        grad, unit, inverse, u, gap = _gradient(keys, values, w, b, eps, gamma, beta, D, BLOCK_D, PRECISION)
        write = (rates[:, None] * grad).to(keys.dtype)
        raw = causal(tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0, BLOCK_K)
        scores = (raw * taus).to(keys.dtype)
        read = tl.dot(queries, w, input_precision=PRECISION) + b
        read -= tl.dot(scores, write, input_precision=PRECISION)
        # q S + s, zero but for the first mini-batch.
        own, opening = pid.to(tl.int64) * CHUNK + i, (i < CHUNK) & (c == 0)
        before = load_tile(kept_before, own, opening, D, BLOCK_D)
        read -= taus * before
        # The read.
        read_unit, read_inverse = standardised(read, eps, D, BLOCK_D)
        grad_gamma += tl.sum(given * read_unit, 0)
        grad_beta += tl.sum(given, 0)
        wide = norm_backward(given, read_unit, read_inverse, gamma, D, BLOCK_D)
        d_read = wide.to(keys.dtype)
        d_raw = causal(tl.dot(d_read, tl.trans(write), input_precision=PRECISION), BLOCK_K)
        grad_tau -= tl.sum(d_raw * raw, 1) + tl.sum(wide * before, 1)
        store_tile(d_before, taus * wide, own, opening, D, BLOCK_D)
        d_raw = (d_raw * -taus).to(keys.dtype)
        d_write = -tl.dot(tl.trans(scores), d_read, input_precision=PRECISION)
        d_query = given + tl.dot(d_read, tl.trans(w), input_precision=PRECISION)
        d_query += tl.dot(d_raw, keys, input_precision=PRECISION)
        d_key = tl.dot(tl.trans(d_raw), queries, input_precision=PRECISION)
        # The update. `after`, `scale`: U and λ.
        # Only the last mini-batch, the first to come here, can be unfinished.
        scale = tl.where(full, tl.where(refused, 0.0, -last), 1.0)
        after = tl.where(full, grad_w, load_matrix(ds_out, pid, D, BLOCK_D, full == 0))
        after_b = tl.where(full, grad_b, load_vector(dsb_out, pid, D, BLOCK_D))
        product = after.to(keys.dtype)
        pull = tl.dot(keys, product, input_precision=PRECISION) + after_b[None, :]
        d_write += scale * pull
        d_key += scale * tl.dot(write, tl.trans(product), input_precision=PRECISION)
        d_last = tl.sum(pull * write.to(tl.float32))
        store_matrix(ds, after, pid, D, BLOCK_D, c == 0)
        if c == 0:
            store_vector(dsb, after_b, pid, D, BLOCK_D)
        grad_tau -= tl.where((i == CHUNK - 1) & full & (refused == 0), d_last, 0.0)
        # The inner gradient.
        tl.store(drate + rows, tl.where(kept, tl.sum(d_write * grad, 1), 0.0), mask=inside)
        dz, du = inner_gradient_backward(rates[:, None] * d_write, unit, inverse, grad, u, gamma, D, BLOCK_D)
        grad_gamma += tl.sum(du * (2.0 * unit * gamma + gap), 0)
        grad_beta += tl.sum(du * gamma, 0)
        d_value, product_z = -gamma * du, dz.to(keys.dtype)
        d_key += tl.dot(product_z, tl.trans(w), input_precision=PRECISION) - d_value
        grad_w += tl.dot(tl.trans(queries), d_read, input_precision=PRECISION)
        grad_w += tl.dot(tl.trans(keys), product_z, input_precision=PRECISION)
        grad_b += tl.sum(wide, 0) + tl.sum(dz, 0)
        store_tile(dq, d_query, rows, inside, D, BLOCK_D)
        store_tile(dk, d_key, rows, inside, D, BLOCK_D)
        store_tile(dv, d_value, rows, inside, D, BLOCK_D)
    store_matrix(dw, grad_w, pid, D, BLOCK_D)
    store_vector(db, grad_b, pid, D, BLOCK_D)
    store_vector(dgamma, grad_gamma, pid, D, BLOCK_D)
    store_vector(dbeta, grad_beta, pid, D, BLOCK_D)
    store_vector(dtau, grad_tau, pid, CHUNK, BLOCK_K)


@triton.jit(do_not_specialize=["num_tokens", "packed"])
def linear_opening(
    q, tau, s0, sb0, position, cu_seqlens, flags, d_before, dq, dtau, ds, dsb, num_tokens, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr,
    packed, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. After `linear_backward`: completes dq and dtau by, and ds, dsb to, what S and s need."""
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
    refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
    full, last = phase + length >= CHUNK, tl.load(tau + CHUNK - 1).to(tl.float32)
    scale = tl.where(full, tl.where(refused, 0.0, -last), 1.0)
    queries = load_tile(q, rows, inside, D, BLOCK_D)
    wide = load_tile(d_before, pid.to(tl.int64) * CHUNK + i, i < CHUNK, D, BLOCK_D)
    scaled = wide.to(queries.dtype)
    earlier, earlier_b = load_matrix(s0, pid, D, BLOCK_D), load_vector(sb0, pid, D, BLOCK_D)
    after, after_b = load_matrix(ds, pid, D, BLOCK_D), load_vector(dsb, pid, D, BLOCK_D)
    d_query = load_tile(dq, rows, inside, D, BLOCK_D).to(tl.float32)
    d_query -= tl.dot(scaled, tl.trans(earlier.to(queries.dtype)), input_precision=PRECISION)
    store_tile(dq, d_query, rows, inside, D, BLOCK_D)
    store_matrix(
        ds, scale * after - tl.dot(tl.trans(queries), scaled, input_precision=PRECISION), pid, D, BLOCK_D
    )  # fmt: skip
    store_vector(dsb, scale * after_b - tl.sum(wide, 0), pid, D, BLOCK_D)
    d_last = tl.where(full & (refused == 0), tl.sum(after * earlier) + tl.sum(after_b * earlier_b), 0.0)
    at = dtau + pid.to(tl.int64) * CHUNK + CHUNK - 1
    tl.store(at, tl.load(at) - d_last)
