# pyright: reportGeneralTypeIssues=false
"""What all sequences share has gradients from each of them: their sums, in one launch."""

import triton
import triton.language as tl


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
