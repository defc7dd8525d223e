# pyright: reportGeneralTypeIssues=false
"""Element-wise work around the matrix products of a layer in Triton, one launch for many of torch's.

Arithmetic is in float32, rounded to the tensors' dtype at the places where torch's own steps would round.
"""

import triton
import triton.language as tl


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)). The hardware's logarithm has few digits near 1, where small rates are: a series has them."""
    small = tl.exp(-tl.abs(x))
    s = small / (2.0 + small)  # at most 1/3; log(1 + small) = 2 artanh(s)
    square = s * s
    series = tl.zeros_like(square)
    for i in tl.static_range(8):
        series = series * square + 1.0 / (15 - 2 * i)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def rms_norm(
    x, weight, gate, base, out, stride, EPS: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows. out [rows, D] = base + silu(gate) · weight · x / sqrt(mean(x²) + EPS).

    x [rows, D] has gaps between its rows, base [rows, D] (if ADDED) none. gate [rows] (if GATED).
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    there = d < D
    dtype: tl.constexpr = out.dtype.element_ty
    wide = tl.load(x + row * stride + d, mask=there, other=0.0).to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + EPS)).to(dtype).to(tl.float32)
    result = (unit * tl.load(weight + d, mask=there, other=0.0).to(dtype).to(tl.float32)).to(dtype)
    if GATED:
        factor = _silu(tl.load(gate + row).to(tl.float32)).to(dtype)
        result = (result.to(tl.float32) * factor.to(tl.float32)).to(dtype)
    if ADDED:
        below = tl.load(base + row * D + d, mask=there, other=0.0).to(tl.float32)
        result = (below + result.to(tl.float32)).to(dtype)
    tl.store(out + row * D + d, result, mask=there)


@triton.jit(do_not_specialize=["count"])
def gated(gate, up, out, count, BLOCK: tl.constexpr):
    """out [count] = silu(gate) · up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    dtype: tl.constexpr = out.dtype.element_ty
    factor = _silu(tl.load(gate + at, mask=there, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    result = factor * tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(dtype), mask=there)


@triton.jit
def _fast(x, scale, offset, at, there, SILU: tl.constexpr):
    """Channels `at` of x, each with its own factor and offset; those are one of two that lie side by side."""
    factor = tl.load(scale + 2 * at, mask=there, other=0.0).to(tl.float32)
    z = x * factor + tl.load(offset + 2 * at, mask=there, other=0.0).to(tl.float32)
    if SILU:
        z = _silu(z)
    return z


@triton.jit
def _both_branches(
    x, scale, offset, turned, fast, at, partner, to, there, cos, sin, EPS: tl.constexpr, SILU: tl.constexpr,
    FAST_ROPE: tl.constexpr,
):  # fmt: skip
    """One head of queries or keys: rotated, and as the fast network reads them."""
    own = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    other = tl.load(x + partner, mask=there, other=0.0).to(tl.float32)
    tl.store(turned + to, (own * cos + other * sin).to(turned.dtype.element_ty), mask=there)
    z = _fast(own, scale, offset, at, there, SILU)
    norm = tl.sqrt(tl.sum(z * z, 0)) + EPS
    z = z / norm
    if FAST_ROPE:
        z = z * cos + _fast(other, scale, offset, partner, there, SILU) / norm * sin
    tl.store(fast + to, z.to(fast.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["length"])
def lact_heads(
    q, k, v, scale, offset, position, rates, q_turned, k_turned, q_fast, k_fast, v_fast, length, q_row, k_row, v_row,
    EPS: tl.constexpr, SILU: tl.constexpr, V_SILU: tl.constexpr, FAST_ROPE: tl.constexpr, HALF: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, fast heads. q, k, v [tokens, heads · D] with gaps between rows, as both branches of LaCT take them.

    Token r is number r % length of the sequence that begins at position[r // length]. scale, offset: [heads · D, 2], of
    q and of k. rates [HALF]: of the rotation, which pairs channels (i, i + HALF) in every 2 · HALF; those divide D.
    """
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    there, inside, at = d < D, d % (2 * HALF), head * D + d
    first = inside < HALF
    partner, to = at + tl.where(first, HALF, -HALF), row * tl.num_programs(1) * D + at
    place = tl.load(position + row // length) + row % length
    angle = place.to(tl.float32) * tl.load(rates + inside % HALF)
    cos, sin = tl.cos(angle), tl.sin(angle)
    sin = tl.where(first, -sin, sin)
    _both_branches(
        q + row * q_row, scale, offset, q_turned, q_fast, at, partner, to, there, cos, sin, EPS, SILU, FAST_ROPE
    )
    _both_branches(
        k + row * k_row, scale + 1, offset + 1, k_turned, k_fast, at, partner, to, there, cos, sin, EPS, SILU, FAST_ROPE
    )
    value = tl.load(v + row * v_row + at, mask=there, other=0.0)
    if V_SILU:
        value = _silu(value.to(tl.float32))
    tl.store(v_fast + to, value.to(v_fast.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count", "others", "shift"])
def lact_rates(
    rate, momentum, rate_out, momentum_out, count, others, shift, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr
):
    """rate_out [count] = softplus(rate + shift); momentum_out [others] = sigmoid(momentum), if MOMENTUM."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(rate + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(rate_out + at, _softplus(x + shift), mask=at < count)
    if MOMENTUM:
        x = tl.load(momentum + at, mask=at < others, other=0.0).to(tl.float32)
        tl.store(momentum_out + at, tl.sigmoid(x), mask=at < others)


@triton.jit
def _put(buffer, token, place, n, at, SIZE: tl.constexpr):
    value = tl.load(token + n * SIZE + at, mask=at < SIZE, other=0.0)
    tl.store(buffer + place * SIZE + at, value.to(buffer.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["slots"])
def put_tokens(
    a_buffer, b_buffer, c_buffer, d_buffer, a, b, c, d, position, slots, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: sequences, blocks of a token. Each buffer [N, slots, size] gets its token [N, size] at position % slots."""
    n, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = n * slots + tl.load(position + n) % slots
    _put(a_buffer, a, place, n, at, A)
    _put(b_buffer, b, place, n, at, B)
    _put(c_buffer, c, place, n, at, C)
    _put(d_buffer, d, place, n, at, D)


@triton.jit
def _project(x, weight, bias, row, j, d, D: tl.constexpr):
    """Number j of a linear layer's result, rounded to the layer's dtype."""
    given = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    value = tl.sum(given * tl.load(weight + j * D + d, mask=d < D, other=0.0).to(tl.float32), 0)
    return (value + tl.load(bias + j).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["shift"])
def lact_scalars(
    x, rate, rate_bias, momentum, momentum_bias, gate, gate_bias, rate_out, momentum_out, gate_out, shift,
    RATES: tl.constexpr, MOMENTA: tl.constexpr, GATES: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: tokens, numbers per token. Three projections of x [tokens, D], weights [·, D], and what becomes of them."""
    row, j, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    if j < RATES:
        value = _softplus(_project(x, rate, rate_bias, row, j, d, D) + shift)
        tl.store(rate_out + row * RATES + j, value)
    elif j < RATES + MOMENTA:
        at = j - RATES
        value = tl.sigmoid(_project(x, momentum, momentum_bias, row, at, d, D))
        tl.store(momentum_out + row * MOMENTA + at, value)
    else:
        at = j - RATES - MOMENTA
        value = _project(x, gate, gate_bias, row, at, d, D)
        tl.store(gate_out + row * GATES + at, value.to(gate_out.dtype.element_ty))
