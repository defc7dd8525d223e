# pyright: reportGeneralTypeIssues=false
"""What the kernels' marks say about each sequence, in one launch."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_tokens", "packed"])
def count_marks(
    flags, cu_seqlens, position, count, first, position_out, count_out, first_out, num_tokens, H, packed,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid: sequences. flags: [tokens, H] integers, positive for a fault in that head; all else [N] int64."""
    n, t, j = tl.program_id(0), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    start, length = n.to(tl.int64) * num_tokens, num_tokens
    if packed > 0:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1).to(tl.int64) - start).to(tl.int32)
    found, earliest = tl.zeros([BLOCK_T], tl.int32), tl.zeros([BLOCK_T], tl.int32) + length
    for offset in range(0, length, BLOCK_T):
        marked = tl.zeros([BLOCK_T, BLOCK_H], tl.int32)
        at = flags + (start + offset + t)[:, None] * H
        for column in range(0, H, BLOCK_H):
            there = (offset + t < length)[:, None] & (column + j < H)[None, :]
            marked += (tl.load(at + column + j[None, :], mask=there, other=0) > 0).to(tl.int32)
        token = tl.max(marked, 1) > 0
        found += token.to(tl.int32)
        earliest = tl.minimum(earliest, tl.where(token, offset + t, length))
    total, old, began = tl.sum(found), tl.load(first + n), tl.load(position + n)
    tl.store(position_out + n, began + length)
    tl.store(count_out + n, tl.load(count + n) + total)
    tl.store(first_out + n, tl.where((old < 0) & (total > 0), began + tl.min(earliest), old))
