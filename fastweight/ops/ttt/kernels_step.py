# pyright: reportGeneralTypeIssues=false
"""One token for each sequence (decoding): gradient, sum, read and, at a mini-batch's end, the update, in one kernel.

One program holds one sequence and head. Everything is float32: with one token there is no matrix product to speed up.
Where the token stands in its mini-batch is read on the device. Legend in kernels_shared.py and kernels_mlp.py.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp import block_at
from fastweight.ops.ttt.kernels_shared import (
    count_not_finite,
    gelu,
    inner_gradient,
    load_matrix,
    load_vector,
    standardised,
    store_matrix,
    store_vector,
)


@triton.jit
def _token(
    q, k, v, rate, tau, ln_weight, ln_bias, position, pid, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """q, k, v [BLOCK_D], r, γ, β, the token's τ, whether it ends its mini-batch, and 1 if something is not finite."""
    h = pid % H
    slot = tl.load(position + pid // H) % CHUNK
    queries, keys = load_vector(q, pid, D, BLOCK_D), load_vector(k, pid, D, BLOCK_D)
    values, r = load_vector(v, pid, D, BLOCK_D), tl.load(rate + pid).to(tl.float32)
    silent = count_not_finite(keys) + count_not_finite(values) + tl.where(tl.abs(r) < float("inf"), 0, 1)
    keys, values = tl.where(silent > 0, 0.0, keys), tl.where(silent > 0, 0.0, values)
    r = tl.where(silent > 0, 0.0, r)
    gamma, beta = load_vector(ln_weight, h, D, BLOCK_D), load_vector(ln_bias, h, D, BLOCK_D)
    return queries, keys, values, r, gamma, beta, tl.load(tau + slot).to(tl.float32), slot == CHUNK - 1, silent


@triton.jit
def _normed(z, eps, gamma, beta, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """LN(z) of one row [BLOCK_D]."""
    unit = standardised(z[None, :], eps, D, BLOCK_D)[0]
    return tl.sum(unit, 0) * gamma + beta


@triton.jit
def _gradient(z, k, v, eps, gamma, beta, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """G(z) of one row [BLOCK_D]."""
    unit, inverse = standardised(z[None, :], eps, D, BLOCK_D)
    grad = inner_gradient(unit, inverse, (beta - (v - k))[None, :], gamma[None, :], D, BLOCK_D)[0]
    return tl.sum(grad, 0)


@triton.jit
def _largest(x):
    """What x is multiplied by in an outer product at most; 1 for the bias."""
    return tl.maximum(tl.max(tl.abs(x)), 1.0)


@triton.jit
def linear_step(
    q, k, v, rate, tau, ln_weight, ln_bias, w0, b0, s0, sb0, position, y, w_out, b_out, s_out, sb_out, flags, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid: sequences · heads. q, k, v, y [N, H, D]; rate, flags [N, H]; flags as in `load_learning`, all written."""
    pid = tl.program_id(0)
    queries, keys, values, r, gamma, beta, t, ends, silent = _token(
        q, k, v, rate, tau, ln_weight, ln_bias, position, pid, H, D, BLOCK_D, CHUNK
    )
    w, b = load_matrix(w0, pid, D, BLOCK_D), load_vector(b0, pid, D, BLOCK_D)
    grad = _gradient(tl.sum(keys[:, None] * w, 0) + b, keys, values, eps, gamma, beta, D, BLOCK_D)
    write = r * grad
    silent += count_not_finite(write * _largest(keys))
    write = tl.where(silent > 0, 0.0, write)
    total = load_matrix(s0, pid, D, BLOCK_D) + keys[:, None] * write[None, :]
    total_b = load_vector(sb0, pid, D, BLOCK_D) + write
    own, own_b = w - t * total, b - t * total_b
    read = tl.sum(queries[:, None] * own, 0) + own_b
    store_vector(y, (queries + _normed(read, eps, gamma, beta, D, BLOCK_D)).to(y.dtype.element_ty), pid, D, BLOCK_D)
    sound = count_not_finite(own) + count_not_finite(own_b) == 0
    store_matrix(w_out, tl.where(ends & sound, own, w), pid, D, BLOCK_D)
    store_vector(b_out, tl.where(ends & sound, own_b, b), pid, D, BLOCK_D)
    store_matrix(s_out, tl.where(ends, 0.0, total), pid, D, BLOCK_D)
    store_vector(sb_out, tl.where(ends, 0.0, total_b), pid, D, BLOCK_D)
    flag = tl.where(silent > 0, 1, 0) + tl.where(ends & (sound == 0), 2, 0)
    tl.store(flags + pid, flag.to(flags.dtype.element_ty))


@triton.jit
def mlp_step(
    q, k, v, rate, tau, ln_weight, ln_bias, w1, b1, w2, b2, s1, t1, s2, t2, position,
    y, w1_out, b1_out, w2_out, b2_out, s1_out, t1_out, s2_out, t2_out, flags, eps, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As `linear_step`, with four parts of a memory, in blocks of hidden units."""
    pid = tl.program_id(0)
    queries, keys, values, r, gamma, beta, t, ends, silent = _token(
        q, k, v, rate, tau, ln_weight, ln_bias, position, pid, H, D, BLOCK_D, CHUNK
    )
    bias2 = load_vector(b2, pid, D, BLOCK_D)
    z2 = bias2
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        x = gelu(_hidden(keys, w1 + at1, in1, b1 + at_b, in_b)[0])[0]
        z2 += tl.sum(x[:, None] * tl.load(w2 + at2, mask=in2, other=0.0), 0)
    write2 = r * _gradient(z2, keys, values, eps, gamma, beta, D, BLOCK_D)
    faults = count_not_finite(write2)
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        x, slope, _curve = gelu(_hidden(keys, w1 + at1, in1, b1 + at_b, in_b)[0])
        second = tl.load(w2 + at2, mask=in2, other=0.0)
        write1 = tl.sum(second * write2[None, :], 1) * slope
        faults += count_not_finite(write1 * _largest(keys)) + count_not_finite(write2 * tl.max(tl.abs(x)))
    silent += faults
    write2 = tl.where(silent > 0, 0.0, write2)
    total2_b = load_vector(t2, pid, D, BLOCK_D) + write2
    own2_b = bias2 - t * total2_b
    read, bad = own2_b, count_not_finite(own2_b)
    for column in range(0, C, BLOCK_C):
        at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
        z1, first, bias1 = _hidden(keys, w1 + at1, in1, b1 + at_b, in_b)
        x, slope, _curve = gelu(z1)
        second = tl.load(w2 + at2, mask=in2, other=0.0)
        write1 = tl.where(silent > 0, 0.0, tl.sum(second * write2[None, :], 1) * slope)
        total1 = tl.load(s1 + at1, mask=in1, other=0.0) + keys[:, None] * write1[None, :]
        total1_b = tl.load(t1 + at_b, mask=in_b, other=0.0) + write1
        total2 = tl.load(s2 + at2, mask=in2, other=0.0) + tl.where(silent > 0, 0.0, x)[:, None] * write2[None, :]
        own1, own1_b, own2 = first - t * total1, bias1 - t * total1_b, second - t * total2
        active = gelu(tl.sum(queries[:, None] * own1, 0) + own1_b)[0]
        read += tl.sum(active[:, None] * own2, 0)
        bad += count_not_finite(own1) + count_not_finite(own1_b) + count_not_finite(own2)
        tl.store(w1_out + at1, tl.where(ends, own1, first), mask=in1)
        tl.store(b1_out + at_b, tl.where(ends, own1_b, bias1), mask=in_b)
        tl.store(w2_out + at2, tl.where(ends, own2, second), mask=in2)
        tl.store(s1_out + at1, tl.where(ends, 0.0, total1), mask=in1)
        tl.store(t1_out + at_b, tl.where(ends, 0.0, total1_b), mask=in_b)
        tl.store(s2_out + at2, tl.where(ends, 0.0, total2), mask=in2)
    store_vector(y, (queries + _normed(read, eps, gamma, beta, D, BLOCK_D)).to(y.dtype.element_ty), pid, D, BLOCK_D)
    refused = ends & (bad > 0)
    store_vector(b2_out, tl.where(ends & (refused == 0), own2_b, bias2), pid, D, BLOCK_D)
    store_vector(t2_out, tl.where(ends, 0.0, total2_b), pid, D, BLOCK_D)
    tl.store(flags + pid, (tl.where(silent > 0, 1, 0) + tl.where(refused, 2, 0)).to(flags.dtype.element_ty))
    if refused:
        tl.debug_barrier()
        for column in range(0, C, BLOCK_C):
            at1, in1, at2, in2, at_b, in_b = block_at(pid, column, D, BLOCK_D, C, BLOCK_C)
            tl.store(w1_out + at1, tl.load(w1 + at1, mask=in1), mask=in1)
            tl.store(b1_out + at_b, tl.load(b1 + at_b, mask=in_b), mask=in_b)
            tl.store(w2_out + at2, tl.load(w2 + at2, mask=in2), mask=in2)


@triton.jit
def _hidden(k, w1, in1, b1, in_b):
    """z1, W1 and b1 of a block of hidden units."""
    w, bias = tl.load(w1, mask=in1, other=0.0), tl.load(b1, mask=in_b, other=0.0)
    return tl.sum(k[:, None] * w, 0) + bias, w, bias
