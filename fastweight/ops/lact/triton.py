"""The GPU's path: bfloat16 products, the element-wise work and Newton–Schulz in fused kernels."""

from typing import Any

from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.lact import LactPending, LactState, Rule
from fastweight.ops.lact.chunked import run


def refuses(q: Tensor, *args: Any, **settings: Any) -> str | None:
    """Why these inputs cannot run here."""
    return why_no_kernels(q)


@dispatch.register_backend("lact", "triton", refuses)
def triton(
    q: Tensor, tokens: LactPending, state: LactState, *, rule: Rule, cu_seqlens: Tensor | None
) -> tuple[Tensor, LactState]:
    """The inputs of `chunked`. Products take k and v in the dtype of the state's buffers, and weights rounded to it."""
    return run(q, tokens, state, rule, cu_seqlens, precise=False, fused=True)
