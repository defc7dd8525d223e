# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU with the memory in registers, forward and replay (names as in kernels_mlp.py).

For inputs of two bytes and memories of up to 64 × 256 (layout.py: `held`). Tokens are rows, as there. W1 and W2, in
float32, are what the updates −τ_last kᵀ P1 and −τ_last xᵀ P2 accumulate on, so they never leave the registers; once per
mini-batch a rounded copy of each goes to shared memory, from where all products read it. −τ_last k and −τ_last P2 are
rounded for the products. Both lie upright, [C, D], in the forward pass: a Hopper GPU makes an update of so many rows
without moving accumulators. The replay, which writes more, is shorter with both as [D, C]. What is special about a
mini-batch (it began in an earlier call, or ends in a later one) is left to `mini_batch` of kernels_mlp.py, before and
after the loop.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_handed_on import store_folded
from fastweight.ops.ttt.kernels_mlp import copy_memory, finish, mini_batch
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
def gate_of(x):
    """σ(2a) of the tanh GELU, 2a = 1.5957691 (x + 0.044715 x³), and x², bounded: times a slope of zero it is zero."""
    square = tl.minimum(x * x, 10000.0)
    power = tl.math.exp2(x * (-2.3022081986 - 0.1029432396 * square))  # e^(−2a), or infinite
    root = tl.math.rsqrt(1.0 + power)  # its square costs less than a division
    return root * root, square


@triton.jit
def quick_gelu(x):
    """φ(x), φ'(x), φ''(x) with fewer instructions than `gelu`, as exact as products of two bytes need."""
    gate, square = gate_of(x)
    slope = 1.5957691216057308 + 0.2140643239 * square  # 2a'
    bend = gate - gate * gate
    turn = bend * (0.4281288976356015 * x + slope * slope * (1.0 - 2.0 * gate))
    return x * gate, gate + x * slope * bend, 2.0 * bend * slope + x * turn


@triton.jit
def add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def add_six(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def moments(z, eps, D: tl.constexpr):
    """Mean and 1 / s of each row, from sums that one exchange between warps makes; z is zero from column D on."""
    total, squares = tl.reduce((z, z * z), 1, add_two)
    mean = total * (1.0 / D)
    return mean[:, None], tl.math.rsqrt(tl.maximum(squares * (1.0 / D) - mean * mean, 0.0) + eps)[:, None]


@triton.jit
def inner_step(z2, gap, gamma, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """G(z2) and unit [K, D]; and of each token 1 / s, mean u, mean(u unit), mean(γ² unit), mean(γ² unit²).

    As `standardised` and `inner_gradient`, but with all sums over D at once. gap: β − Y; gamma: [1, D].
    """
    gamma2, gap = gamma * gamma, gamma * gap
    all_gamma2 = tl.sum(gamma2)
    total, squares, weighted, weighted_squares, crossed, gaps = tl.reduce(
        (z2, z2 * z2, gamma2 * z2, gamma2 * z2 * z2, gap * z2, gap + 0.0 * z2), 1, add_six
    )  # the term of 0 keeps gap in z2's layout
    mean = total * (1.0 / D)
    inverse = tl.math.rsqrt(tl.maximum(squares * (1.0 / D) - mean * mean, 0.0) + eps)
    once = (weighted - mean * all_gamma2) * inverse
    twice = (weighted_squares - 2.0 * mean * weighted + mean * mean * all_gamma2) * inverse * inverse
    mean_u, mean_uu = once + gaps, twice + (crossed - mean * gaps) * inverse
    once, twice, mean_u, mean_uu = once * (1.0 / D), twice * (1.0 / D), mean_u * (1.0 / D), mean_uu * (1.0 / D)
    unit = within((z2 - mean[:, None]) * inverse[:, None], D, BLOCK_D)
    grad = (gamma2 * unit + gap - mean_u[:, None] - unit * mean_uu[:, None]) * inverse[:, None]
    return within(grad, D, BLOCK_D), unit, inverse, mean_u, mean_uu, once, twice


@triton.jit
def scaled(x, factor):
    """factor · x in x's dtype."""
    return (factor * x.to(tl.float32)).to(x.dtype)


@triton.jit
def matrices_at(
    index, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, UPRIGHT: tl.constexpr
):  # fmt: skip
    """Offsets of W1 [·, D, C] and W2 [·, C, D] number `index` as [D, C] tiles, or, UPRIGHT, [C, D], and which there
    are."""
    if UPRIGHT:
        d, j = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, WHOLE)[:, None]
    else:
        d, j = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, WHOLE)[None, :]
    start = index.to(tl.int64) * (D * C)
    return start + d * C + j, start + j * D + d, (d < D) & (j < C)


@triton.jit
def load_memory(
    w1, b1, w2, b2, index, D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    UPRIGHT: tl.constexpr,
):  # fmt: skip
    """W1, b1, W2, b2 of memory number `index`; matrices as [D, C], or, UPRIGHT, as [C, D]."""
    at1, at2, there = matrices_at(index, D, BLOCK_D, C, WHOLE, UPRIGHT)
    first, second = tl.load(w1 + at1, mask=there, other=0.0), tl.load(w2 + at2, mask=there, other=0.0)
    return first, load_vector(b1, index, C, WHOLE), second, load_vector(b2, index, D, BLOCK_D)


@triton.jit
def store_memory(
    w1, b1, w2, b2, first, bias1, second, bias2, index,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, UPRIGHT: tl.constexpr,
):  # fmt: skip
    at1, at2, there = matrices_at(index, D, BLOCK_D, C, WHOLE, UPRIGHT)
    tl.store(w1 + at1, first, mask=there)
    tl.store(w2 + at2, second, mask=there)
    store_vector(b1, bias1, index, C, WHOLE)
    store_vector(b2, bias2, index, D, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "packed", "keep"])
def mlp_forward_held(
    q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position, cu_seqlens,
    y, w1_out, b1_out, w2_out, b2_out, s1_out, t1_out, s2_out, t2_out, flags, suspects,
    kept_w1, kept_b1, kept_w2, kept_b2, num_tokens, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, keep, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. Arguments and results as of `mlp_forward`, without its guard. WHOLE ≥ C."""
    pid = tl.program_id(0)
    n, h, i = pid // H, pid % H, tl.arange(0, BLOCK_K)
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    taus = tl.load(tau + i, mask=i < CHUNK, other=0.0).to(tl.float32)[:, None]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    slot = start // (CHUNK * EVERY) + 2 * n
    whole, chunks = (phase + length) // CHUNK, (phase + length + CHUNK - 1) // CHUNK
    tokens, span, norm = (q, k, v, rate, y, flags), (start, length, phase, pid, h, H), (gamma, beta, taus, last, eps)
    memory, kept = (w1_out, b1_out, w2_out), (kept_w1, kept_b1, kept_w2, kept_b2)
    sums, left = (s1, t1, s2, t2), (s1_out, t1_out, s2_out, t2_out)
    copy_memory(w1, b1, w2, pid, w1_out, b1_out, w2_out, pid, D, BLOCK_D, C, BLOCK_C)
    bias2, faults = load_vector(b2, pid, D, BLOCK_D), 0
    begin = tl.where(phase > 0, tl.minimum(chunks, 1), 0)
    for c in range(begin):
        bias2, faults = mini_batch(
            c, bias2, faults, tokens, span, norm, memory, sums, left, kept, slot, keep,
            D, BLOCK_D, C, BLOCK_C, CHUNK, BLOCK_K, EVERY, PRECISION, False,
        )  # fmt: skip
    store_vector(b2_out, bias2, pid, D, BLOCK_D)
    tl.debug_barrier()
    first, bias1, second, bias2 = load_memory(w1_out, b1_out, w2_out, b2_out, pid, D, BLOCK_D, C, WHOLE, True)
    for s in range(begin // EVERY, (whole + EVERY - 1) // EVERY):
        if (keep > 0) & (s * EVERY >= begin):
            index = (slot + s) * H + h
            store_memory(
                kept_w1, kept_b1, kept_w2, kept_b2, first, bias1, second, bias2, index, D, BLOCK_D, C, WHOLE, True
            )  # fmt: skip
        for c in range(tl.maximum(s * EVERY, begin), tl.minimum((s + 1) * EVERY, whole)):
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            queries, keys = load_tile(q, rows, inside, D, BLOCK_D), load_tile(k, rows, inside, D, BLOCK_D)
            values = load_tile(v, rows, inside, D, BLOCK_D)
            rates = tl.load(rate + rows, mask=inside, other=0.0).to(tl.float32)
            one, two = first.to(q.dtype.element_ty), second.to(q.dtype.element_ty)
            x, slope, _curve = quick_gelu(tl.dot(keys, tl.trans(one)) + bias1[None, :])
            x = x.to(keys.dtype)
            middle = tl.dot(queries, tl.trans(one)) + bias1[None, :]
            scores = causal(tl.dot(queries, tl.trans(keys)) + 1.0, BLOCK_K) * -taus
            z2 = tl.dot(x, two) + bias2[None, :]
            gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
            wide2 = rates[:, None] * inner_step(z2, gap, gamma, eps, D, BLOCK_D)[0]
            write2 = wide2.to(keys.dtype)
            wide1 = tl.dot(write2, tl.trans(two)) * slope
            write1 = wide1.to(keys.dtype)
            middle = tl.dot(scores.to(keys.dtype), write1, middle)
            active = (middle * gate_of(middle)[0]).to(keys.dtype)
            mixed = causal(tl.dot(active, tl.trans(x)) + 1.0, BLOCK_K) * -taus
            read = tl.dot(active, two)
            read = tl.dot(mixed.to(keys.dtype), write2, read) + bias2[None, :]
            mean, inverse = moments(read, eps, D)
            result = queries.to(tl.float32) + (read - mean) * inverse * gamma + beta
            store_tile(y, result, rows, inside, D, BLOCK_D)
            first = tl.dot(tl.trans(write1), scaled(keys, -last), first)
            second = tl.dot(tl.trans(x), (wide2 * -last).to(keys.dtype), second)
            bias1 -= last * tl.sum(wide1, 0)
            bias2 -= last * tl.sum(wide2, 0)
    store_memory(w1_out, b1_out, w2_out, b2_out, first, bias1, second, bias2, pid, D, BLOCK_D, C, WHOLE, True)
    tl.debug_barrier()
    bias2 = load_vector(b2_out, pid, D, BLOCK_D)
    for c in range(tl.maximum(whole, begin), chunks):
        bias2, faults = mini_batch(
            c, bias2, faults, tokens, span, norm, memory, sums, left, kept, slot, keep,
            D, BLOCK_D, C, BLOCK_C, CHUNK, BLOCK_K, EVERY, PRECISION, False,
        )  # fmt: skip
    store_vector(b2_out, bias2, pid, D, BLOCK_D)
    faults += finish(
        memory, bias2, left, pid, (phase + length) % CHUNK == 0, D, BLOCK_D, C, BLOCK_C
    )  # fmt: skip
    tl.store(suspects + pid, faults)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "first", "packed"])
def mlp_replay_held(
    k, v, rate, tau, ln_weight, ln_bias, s1, t1, s2, t2, position, cu_seqlens, flags,
    kept_w1, kept_b1, kept_w2, kept_b2, owner, base, firsts, biases1, seconds, biases2, totals1,
    units, grads2, statistics, xs, writes1, slopes, bends, num_tokens, num_sequences, first, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, EVERY: tl.constexpr, packed, WARPS: tl.constexpr,
):  # fmt: skip
    """Grid: (stretches, heads), as `mlp_replay`. Written for each mini-batch and head, [stretches · EVERY, H, …]:

    in q's dtype the rounded W1 and W2ᵀ [·, D, C], x, P1 [·, CHUNK, C] and, as `store_folded` does, φ'(z1) and
    E ⊙ φ''(z1); in float32 b1, b2, the sum of P1 (not rounded) [·, C], folded unit and G, and the five statistics of
    `inner_step` [·, CHUNK, 8].
    """
    stretch, h, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_K)
    n = tl.load(owner + stretch)
    if n >= num_sequences:
        return
    start, length, phase = span_of(cu_seqlens, position, n, num_tokens, CHUNK, packed)
    begin = first + (stretch - tl.load(base + n)) * EVERY
    end = tl.minimum(begin + EVERY, (phase + length + CHUNK - 1) // CHUNK)
    if begin >= end:
        return
    gamma = load_vector(ln_weight, h, D, BLOCK_D)[None, :]
    beta = load_vector(ln_bias, h, D, BLOCK_D)[None, :]
    last = tl.load(tau + CHUNK - 1).to(tl.float32)
    index, pid = (start // (CHUNK * EVERY) + 2 * n + begin // EVERY) * H + h, n * H + h
    one, bias1, two, bias2 = load_memory(kept_w1, kept_b1, kept_w2, kept_b2, index, D, BLOCK_D, C, WHOLE, False)
    opening = (begin == 0) & (phase > 0)  # sums from before the call, which the first update takes along
    middle = tl.where(opening, tl.minimum(begin + 1, end), begin)
    here = i < CHUNK
    for piece in range(2):
        for c in range(tl.where(piece == 0, begin, middle), tl.where(piece == 0, middle, end)):
            place = (stretch * EVERY + c - begin).to(tl.int64) * H + h
            rows, inside = rows_of(c, start, length, phase, h, H, CHUNK, BLOCK_K)
            keys, values, rates, _kept, refused = load_learning(k, v, rate, flags, rows, inside, D, BLOCK_D)
            step = tl.where(refused, 0.0, -last)
            first1, second1 = one.to(k.dtype.element_ty), two.to(k.dtype.element_ty)
            at1, _at2, there = matrices_at(place, D, BLOCK_D, C, WHOLE, False)
            tl.store(firsts + at1, first1, mask=there)
            tl.store(seconds + at1, second1, mask=there)
            store_vector(biases1, bias1, place, C, WHOLE)
            store_vector(biases2, bias2, place, D, BLOCK_D)
            x, slope, curve = quick_gelu(tl.dot(keys, first1) + bias1[None, :])
            x = x.to(keys.dtype)
            z2 = tl.dot(x, tl.trans(second1)) + bias2[None, :]
            gap = beta - (values.to(tl.float32) - keys.to(tl.float32))
            grad2, unit, inverse, mean_u, mean_uu, once, twice = inner_step(z2, gap, gamma, eps, D, BLOCK_D)
            own = place * CHUNK + i
            store_folded(units, unit, place, CHUNK, BLOCK_K, D, BLOCK_D, WARPS)
            store_folded(grads2, grad2, place, CHUNK, BLOCK_K, D, BLOCK_D, WARPS)
            which = tl.arange(0, 8)[None, :]
            found = tl.where(which == 1, mean_u[:, None], tl.where(which == 2, mean_uu[:, None], inverse[:, None]))
            found = tl.where(which == 3, once[:, None], tl.where(which == 4, twice[:, None], found))
            store_tile(statistics, found, own, here, 8, 8)
            wide2 = rates[:, None] * grad2
            error = tl.dot(wide2.to(keys.dtype), second1)
            wide1 = error * slope
            write1, total1 = wide1.to(keys.dtype), tl.sum(wide1, 0)
            store_tile(xs, x, own, here, C, WHOLE)
            store_tile(writes1, write1, own, here, C, WHOLE)
            store_folded(slopes, slope, place, CHUNK, BLOCK_K, C, WHOLE, WARPS)
            store_folded(bends, error * curve, place, CHUNK, BLOCK_K, C, WHOLE, WARPS)
            store_vector(totals1, total1, place, C, WHOLE)
            one = tl.dot(tl.trans(scaled(keys, step)), write1, one)
            two = tl.dot(tl.trans((wide2 * step).to(keys.dtype)), x, two)
            bias1 += step * total1
            bias2 += step * tl.sum(wide2, 0)
        if (piece == 0) & opening:
            rows, inside = rows_of(0, start, length, phase, h, H, CHUNK, BLOCK_K)
            refused = tl.max(tl.load(flags + rows, mask=inside, other=0).to(tl.int32)) > 1
            step = tl.where(refused, 0.0, -last)
            s_one, s_bias1, s_two, s_bias2 = load_memory(s1, t1, s2, t2, pid, D, BLOCK_D, C, WHOLE, False)
            one, two = one + step * s_one, two + step * s_two
            bias1, bias2 = bias1 + step * s_bias1, bias2 + step * s_bias2
