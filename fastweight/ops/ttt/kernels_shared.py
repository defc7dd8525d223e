# pyright: reportGeneralTypeIssues=false
"""What the kernels of both memories share: where a sequence lies, the layer norm, the inner gradient, its derivative.

Legend of all kernels here, for one (sequence, head) and one mini-batch of K tokens, rows are tokens:
q, k, v [K, D]; r [K] the tokens' rates; τ [K]; Y = v − k the target; γ, β [D] the layer norm inside loss and read.
z → unit = (z − mean z) / s, s² = var z + eps, LN(z) = γ unit + β; u = γ (LN(z) − Y);
G = ∂/∂z ½‖LN(z) − Y‖² = (u − mean u − unit · mean(u unit)) / s; P = r G, the write, rounded to the products' dtype.
Σ: a mini-batch's sum of gradients, S its value when the call began; W' = W − τ_last Σ where the mini-batch ends.
Derivative of G: for e = ∂L/∂G, w = e / s, c = mean(u unit):
∂L/∂u = w − mean w − unit · mean(w unit); ∂L/∂unit = γ² ∂L/∂u − c w − u · mean(w unit) =: n;
∂L/∂z = (n − mean n − unit · (mean(n unit) + mean(e G))) / s; ∂L/∂Y = −γ ∂L/∂u.
"""

import triton
import triton.language as tl


@triton.jit
def span_of(cu_seqlens, position, n, num_tokens, CHUNK: tl.constexpr, packed):
    """First token (int64), number of tokens, and tokens its running mini-batch held before, of sequence n."""
    if packed > 0:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = n.to(tl.int64) * num_tokens
        length = num_tokens
    phase = (tl.load(position + n) % CHUNK).to(tl.int32)
    return start, length, phase


@triton.jit
def rows_of(c, start, length, phase, h, H, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row (token, head) of each slot of mini-batch c, and whether there is such a token in this call."""
    i = tl.arange(0, BLOCK_K)
    index = c * CHUNK - phase + i
    inside = (i < CHUNK) & (index >= 0) & (index < length)
    return (start + index) * H + h, inside


@triton.jit
def load_tile(x, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_K, BLOCK_D] of x [tokens · H, D], zero outside."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x + rows[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(x, value, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = x + rows[:, None] * D + d[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _matrix_at(index, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    return index.to(tl.int64) * (D * D) + d[:, None] * D + d[None, :], (d < D)[:, None] & (d < D)[None, :]


@triton.jit
def load_matrix(x, index, D: tl.constexpr, BLOCK_D: tl.constexpr, wanted=True):
    """Matrix `index` of x [·, D, D], zero beyond, or zero if not wanted."""
    at, there = _matrix_at(index, D, BLOCK_D)
    return tl.load(x + at, mask=there & wanted, other=0.0)


@triton.jit
def store_matrix(x, value, index, D: tl.constexpr, BLOCK_D: tl.constexpr, wanted=True):
    at, there = _matrix_at(index, D, BLOCK_D)
    tl.store(x + at, value, mask=there & wanted)


@triton.jit
def load_vector(x, index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Vector `index` of x [·, SIZE] in float32, zero beyond."""
    j = tl.arange(0, BLOCK)
    return tl.load(x + index.to(tl.int64) * SIZE + j, mask=j < SIZE, other=0.0).to(tl.float32)


@triton.jit
def store_vector(x, value, index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    tl.store(x + index.to(tl.int64) * SIZE + j, value, mask=j < SIZE)


@triton.jit
def within(x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [·, BLOCK_D] with zeros in the columns from D on."""
    if D < BLOCK_D:
        x = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], x, 0.0)
    return x


@triton.jit
def mean_of(x, D: tl.constexpr):
    return (tl.sum(x, 1) * (1.0 / D))[:, None]


@triton.jit
def standardised(z, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """unit and 1 / s of each row [·, 1]; z is zero from column D on."""
    centred = within(z - mean_of(z, D), D, BLOCK_D)
    inverse = tl.math.rsqrt(mean_of(centred * centred, D) + eps)
    return centred * inverse, inverse


@triton.jit
def inner_gradient(unit, inverse, gap, gamma, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """G and u. gap: β − Y, gamma [1, D]."""
    u = within((unit * gamma + gap) * gamma, D, BLOCK_D)
    grad = (u - mean_of(u, D) - unit * mean_of(u * unit, D)) * inverse
    return within(grad, D, BLOCK_D), u


@triton.jit
def inner_gradient_backward(e, unit, inverse, grad, u, gamma, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """∂L/∂z and ∂L/∂u from e = ∂L/∂G; e is zero from column D on."""
    w = e * inverse
    shared = mean_of(w * unit, D)
    du = within(w - mean_of(w, D) - unit * shared, D, BLOCK_D)
    n = gamma * gamma * du - mean_of(u * unit, D) * w - u * shared
    dz = (n - mean_of(n, D) - unit * (mean_of(n * unit, D) + mean_of(e * grad, D))) * inverse
    return within(dz, D, BLOCK_D), du


@triton.jit
def norm_backward(dy, unit, inverse, gamma, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """∂L/∂z of γ unit + β; dy is zero from column D on."""
    n = dy * gamma
    return within((n - mean_of(n, D) - unit * mean_of(n * unit, D)) * inverse, D, BLOCK_D)


@triton.jit
def not_finite(x):
    """1 for each row of x that holds something not finite: [rows]."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1)


@triton.jit
def count_not_finite(x):
    return tl.sum(tl.where(tl.abs(x) < float("inf"), 0, 1))


@triton.jit
def causal(values, BLOCK_K: tl.constexpr):
    """Lower triangle of values [BLOCK_K, BLOCK_K], diagonal included."""
    i = tl.arange(0, BLOCK_K)
    return tl.where(i[:, None] >= i[None, :], values, 0.0)


@triton.jit
def load_learning(k, v, rate, flags, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """k, v, r of a mini-batch whose faults are known, zero for tokens that teach nothing; which tokens
    teach; and whether the update is refused.

    flags: 1 marks a token that teaches nothing, 2 the last token of a mini-batch whose update was not applied.
    """
    flag = tl.load(flags + rows, mask=inside, other=0).to(tl.int32)
    kept = inside & (flag & 1 == 0)
    keys, values = load_tile(k, rows, inside, D, BLOCK_D), load_tile(v, rows, inside, D, BLOCK_D)
    keys, values = tl.where(kept[:, None], keys, 0.0), tl.where(kept[:, None], values, 0.0)
    rates = tl.where(kept, tl.load(rate + rows, mask=inside, other=0.0).to(tl.float32), 0.0)
    return keys.to(k.dtype.element_ty), values.to(v.dtype.element_ty), rates, kept, tl.max(flag) > 1


@triton.jit
def gelu(x):
    """φ(x) = x σ(2a), a = √(2/π) (x + 0.044715 x³) (the tanh form), and its first and second derivative."""
    # Beyond ±10 σ is 0 or 1 to the last bit; so far out squares could overflow.
    near = tl.minimum(tl.maximum(x, -10.0), 10.0)
    square = near * near
    gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * near * (1.0 + 0.044715 * square)))
    gate = tl.where(x < -10.0, 0.0, gate)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * square)  # 2a'
    bend = gate * (1.0 - gate)
    turn = bend * (
        0.4281288976356015 * near + slope * slope * (1.0 - 2.0 * gate)
    )  # d²gate/dx²; the first number is 2a''/x
    return x * gate, gate + x * (bend * slope), 2.0 * bend * slope + x * turn


@triton.jit(do_not_specialize=["num_rows"])
def shared_totals(
    rows, dtau, dgamma, dbeta, num_rows, H, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Grid: H + CHUNK. rows [num_rows, H, CHUNK + 2 D] float32.

    dtau [CHUNK]: the sum over rows and heads of the first CHUNK columns; dgamma, dbeta [H, D]: that over rows of the
    others.
    """
    pid, stride = tl.program_id(0), CHUNK + 2 * D
    if pid < H:
        r, d = tl.arange(0, 16), tl.arange(0, BLOCK_D)
        gamma, beta = tl.zeros([16, BLOCK_D], tl.float32), tl.zeros([16, BLOCK_D], tl.float32)
        for row in range(0, num_rows, 16):
            there = (row + r < num_rows)[:, None] & (d < D)[None, :]
            place = rows + ((row + r).to(tl.int64) * H + pid)[:, None] * stride + CHUNK + d[None, :]
            gamma += tl.load(place, mask=there, other=0.0)
            beta += tl.load(place + D, mask=there, other=0.0)
        tl.store(dgamma + pid * D + d, tl.sum(gamma, 0).to(dgamma.dtype.element_ty), mask=d < D)
        tl.store(dbeta + pid * D + d, tl.sum(beta, 0).to(dbeta.dtype.element_ty), mask=d < D)
    else:
        m, column = tl.arange(0, 1024), pid - H
        tau = tl.zeros([1024], tl.float32)
        for start in range(0, num_rows * H, 1024):
            at = rows + (start + m).to(tl.int64) * stride + column
            tau += tl.load(at, mask=start + m < num_rows * H, other=0.0)
        tl.store(dtau + column, tl.sum(tau).to(dtau.dtype.element_ty))
