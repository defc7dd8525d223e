# pyright: reportGeneralTypeIssues=false
"""TTT-MLP on a GPU, backward: the walk from the last mini-batch to the first (names as in kernels_mlp.py).

`mlp_backward`, one program per sequence and head, adds what needs the memory's gradient to what `mlp_reads` left
(kernels_mlp_reads.py). Its products are few, the forward pass that it needs was stored, and dW1, dW2 stay in registers
if they fit. With U, λ as in kernels_linear_backward.py:
dP1 += λ (k U1 + u1); dP2 += λ (x U2 + u2) + dE W2, dE = dP1 ⊙ φ'(z1); dr = Σ_D dP2 G; dG = r dP2 → dz2, dY;
dx += λ P2 U2ᵀ + dz2 W2ᵀ; dz1 = dx ⊙ φ'(z1) + dP1 ⊙ E ⊙ φ''(z1); dk += λ P1 U1ᵀ − dY; dv = dY;
dW1 = dW1' + qᵀ dm + kᵀ dz1; dW2 = dW2' + aᵀ d read + xᵀ dz2 + dEᵀ P2; dS += λ U.
"""

import triton
import triton.language as tl

from fastweight.ops.ttt.kernels_mlp import block_of, first_layer, load_block, store_block
from fastweight.ops.ttt.kernels_mlp_reads import second_layer, turned_at
from fastweight.ops.ttt.kernels_shared import (
    inner_gradient_backward,
    load_learning,
    load_tile,
    load_vector,
    rows_of,
    span_of,
    store_tile,
    store_vector,
    within,
)


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
                to, within_c = turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
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
                two = second_layer(all_w2, place, column, D, BLOCK_D, C, BLOCK_C)
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
                to, within_c = turned_at(place, column, C, BLOCK_C, CHUNK, BLOCK_K)
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
                two = second_layer(all_w2, place, column, D, BLOCK_D, C, BLOCK_C)
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
