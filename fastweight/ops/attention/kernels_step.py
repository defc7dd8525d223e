# pyright: reportGeneralTypeIssues=false
"""One query per sequence against its cache in Triton: parts of the cache side by side, then their sum."""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # below every score, and finite: it is subtracted from itself


@triton.jit(do_not_specialize=["slots", "part"])
def attend_part(
    q, k, v, position, sums, tops, totals, slots, part, scale, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: queries, parts of `part` slots. q [N, HEADS · GROUP, D]; k, v [N, slots, HEADS, D].

    A slot is seen if its sequence has read so much: position [N]. Per query and part: tops, the largest score; totals
    and sums [D], of exp(score - top) and of that times the values.
    """
    query, column, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_D)
    n, head = query // (HEADS * GROUP), query % (HEADS * GROUP) // GROUP
    oldest = tl.maximum(slots - tl.load(position + n), 0)
    asked = tl.load(q + query * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    result = tl.zeros([BLOCK_D], tl.float32)
    total = tl.sum(result, 0)
    top = total + LOWEST
    for start in range(column * part, tl.minimum(column * part + part, slots), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        seen = (slot < slots) & (slot < column * part + part) & (slot >= oldest)
        at = ((n * slots + slot) * HEADS + head)[:, None] * D + d[None, :]
        there = seen[:, None] & (d < D)[None, :]
        keys = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(keys * asked[None, :], 1), LOWEST)
        higher = tl.maximum(top, tl.max(score, 0))
        weight = tl.where(seen, tl.exp(score - higher), 0.0)
        shrink = tl.exp(top - higher)
        values = tl.load(v + at, mask=there, other=0.0).to(tl.float32)
        result = result * shrink + tl.sum(weight[:, None] * values, 0)
        total = total * shrink + tl.sum(weight, 0)
        top = higher
    place = query * tl.num_programs(1) + column
    tl.store(sums + place * D + d, result, mask=d < D)
    tl.store(tops + place, top)
    tl.store(totals + place, total)


@triton.jit
def join_parts(
    q, k, v, sums, tops, totals, out, scale, GROUP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: queries. out [N, HEADS · GROUP, D]: the parts and the token's own k, v [N, HEADS, D]."""
    query, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    part, own = query * PARTS + tl.arange(0, PARTS), query // GROUP * D + d
    asked = tl.load(q + query * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    score = tl.sum(asked * tl.load(k + own, mask=d < D, other=0.0).to(tl.float32), 0)
    top = tl.load(tops + part)
    higher = tl.maximum(score, tl.max(top, 0))
    weight, own_weight = tl.exp(top - higher), tl.exp(score - higher)
    total = tl.sum(tl.load(totals + part) * weight, 0) + own_weight
    rows = tl.load(sums + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    value = tl.load(v + own, mask=d < D, other=0.0).to(tl.float32)
    result = (tl.sum(rows * weight[:, None], 0) + own_weight * value) / total
    tl.store(out + query * D + d, result.to(out.dtype.element_ty), mask=d < D)
