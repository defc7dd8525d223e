"""A kernel small enough to know the answer: Σ_k a_k b_k."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, c, n, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N, N], tl.float32)
    for k in range(tl.load(n)):
        at = k.to(tl.int64) * N * N + i[:, None] * N + i[None, :]
        total += tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee")
    tl.store(c + i[:, None] * N + i[None, :], total)
