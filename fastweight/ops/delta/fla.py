"""The chunk kernels of flash-linear-attention (package fla-core, Triton), where they run and are right.

Micro-steps become tokens of their own, as in the chunked backend. Memories that several query heads share are read
with copies, one per query head, of which the first is kept. Products are in the dtype of v (16 bits), sums and the
memory in float32. Under torch.compile each call is a graph break: the package's own choice.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from fastweight.ops import dispatch
from fastweight.ops.delta import fla_tuning
from fastweight.ops.delta.chunked import first, last
from fastweight.ops.delta.naive import naive
from fastweight.ops.kernels import why_no_kernels
from fastweight.ops.sequences import sequence_lengths

LARGEST_KEY = 256
OTHERWISE = 'Use backend="chunked".'


def installed() -> bool:
    """Whether the package is there. It is only looked for: importing it takes seconds and waits for the first call."""
    found = importlib.util.find_spec("fla")
    folders = [] if found is None else found.submodule_search_locations
    return importlib.machinery.PathFinder.find_spec("fla.ops", folders or []) is not None


HAS_FLA = installed()  # a constant: torch.compile traces what refusals ask, and warns of a function with a cache


@functools.cache
def gated_backward_is_wrong() -> bool:
    """Triton 3.4 to 3.7.0 miscompiles the gated backward kernel on Hopper (fla-org/flash-linear-attention#640)."""
    import triton

    release = tuple(int(part) for part in triton.__version__.split(".")[:3])
    return fla_tuning.on_hopper() and (3, 4, 0) <= release < (3, 7, 1)


def refuses(
    q: Tensor, _q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None, *rest: Tensor,
    cu_seqlens: Tensor | None = None, gated: bool = False,
) -> str | None:  # fmt: skip
    """Why these kernels cannot run, or must not; q alone or all that `delta_rule` passes on."""
    if reason := why_no_kernels(q, OTHERWISE[:-1]):
        return reason
    values = q if v is None else v
    if values.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, got v in {values.dtype}. {OTHERWISE}"
    if not HAS_FLA:
        return f"needs the package fla-core. {OTHERWISE[:-1]}, or install it: pip install fla-core."
    if q.shape[-1] > LARGEST_KEY:
        return f"takes keys of at most {LARGEST_KEY} channels, got {q.shape[-1]}. {OTHERWISE}"
    return None


@dispatch.register_backend("delta_rule", "fla", refuses)
def fla(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, memory: Tensor, *,
    cu_seqlens: Tensor | None, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.shape[1] == 1:  # one token is read and written as the definition says
        return naive(q, k, v, beta, decay, memory, cu_seqlens=cu_seqlens, gated=gated)
    order, group = k.shape[2], q.shape[2] // k.shape[3]
    if order > 1:
        q, decay = last(q, order), first(decay, order)
    k, v, beta = (_for_each_query(x.flatten(1, 2), group, 2) for x in (k, v, beta))
    q, k = q.to(v.dtype), k.to(v.dtype)
    start = _for_each_query(memory.float(), group, 1)
    shared = {"scale": 1.0, "initial_state": start, "output_final_state": True}
    if cu_seqlens is not None:
        ends = torch.tensor([0, *sequence_lengths(1, q.shape[1] // order, cu_seqlens)]).cumsum(0) * order
        shared |= {"cu_seqlens": ends.to(q.device), "cu_seqlens_cpu": ends}
    if gated:
        y, after = _gated(q, k, v, _for_each_query(decay.float(), group, 2), beta.float(), **shared)
    else:
        run = _kernels("delta_rule").chunk_delta_rule
        y, after = run(q, k, v, beta.float(), **shared)
    return (y[:, order - 1 :: order] if order > 1 else y), after[:, ::group].to(memory.dtype)


def _for_each_query(x: Tensor, group: int, dim: int) -> Tensor:
    """Memories repeated for the query heads that share them; x itself where none is shared."""
    return x if group == 1 else x.repeat_interleave(group, dim)


def _gated(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, **shared: Any) -> tuple[Tensor, Tensor]:
    """The kernels for one decay per head; for gradients that those get wrong, the kernels for one per channel."""
    if torch.is_grad_enabled() and gated_backward_is_wrong():
        run = _kernels("kda").chunk_kda
        return run(q, k, v, decay[..., None].expand(k.shape).contiguous(), beta, **shared)
    run = _kernels("gated_delta_rule").chunk_gated_delta_rule
    return run(q, k, v, decay, beta, **shared)


@functools.cache
def _kernels(name: str) -> Any:
    """The package's module for one op. What it says of packages that it would also like concerns none of these ops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"fla.ops.{name}")
    fla_tuning.keep_few(name)
    return module
