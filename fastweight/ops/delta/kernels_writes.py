# pyright: reportGeneralTypeIssues=false
"""Which writes are finite, and the writes without the others, in one pass over k and v."""

import triton
import triton.language as tl


@triton.jit
def _finite(x):
    return (tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32)


@triton.jit
def _load_rows(x, at, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the rows that begin `at`, and which of them are finite; zeros outside."""
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(x + at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    return tile, tl.min(_finite(tile), 1)


@triton.jit
def _store_rows(out, tile, row, there, kept, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `row` of out [·, D], zeros in those that are not kept."""
    d = tl.arange(0, BLOCK_D)
    at = out + row[:, None] * D + d[None, :]
    tl.store(at, tl.where(kept[:, None] > 0, tile, 0.0), mask=there[:, None] & (d < D)[None, :])


@triton.jit
def keep_finite_writes(
    k, v, beta, decay, k_out, v_out, beta_out, decay_out, marks, k_token, k_row, v_token, v_row, H,
    ORDER: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid: tokens. k, v [tokens, ORDER · H, ·] with strides, beta [tokens, ORDER · H], decay [tokens, H].

    marks [tokens, H], int8: 1 where the head has a write that is not finite; its decay goes with it.
    """
    token, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_H)
    for column in range(0, H, BLOCK_H):
        head = column + j
        there = head < H
        rate = tl.zeros([BLOCK_H], tl.float32)
        if GATED:
            rate = tl.load(decay + token * H + head, mask=there, other=0.0).to(tl.float32)
        lasting = _finite(rate)
        whole = lasting
        for m in tl.static_range(ORDER):
            row = m * H + head
            place = token * (ORDER * H) + row
            strength = tl.load(beta + place, mask=there, other=0.0).to(tl.float32)
            keys, finite_key = _load_rows(k, token * k_token + row * k_row, there, K, BLOCK_K)
            values, finite_value = _load_rows(v, token * v_token + row * v_row, there, V, BLOCK_V)
            kept = lasting * _finite(strength) * finite_key * finite_value
            _store_rows(k_out, keys, place, there, kept, K, BLOCK_K)
            _store_rows(v_out, values, place, there, kept, V, BLOCK_V)
            tl.store(beta_out + place, tl.where(kept > 0, strength, 0.0), mask=there)
            whole *= kept
        if GATED:
            tl.store(decay_out + token * H + head, tl.where(whole > 0, rate, 0.0), mask=there)
        tl.store(marks + token * H + head, (1 - whole).to(tl.int8), mask=there)
