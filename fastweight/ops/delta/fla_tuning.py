"""Which configurations of flash-linear-attention's kernels are tried on Hopper before the first call.

The package has Triton time up to 36 configurations of each kernel, 133 on the way of one gated call with gradients,
again for each number of heads and channels. Compiling them takes minutes, most of it for those that spill thousands of
bytes. Here each kernel keeps one of the package's own, and those of the memory's recurrence and of the outputs two: at
most 14 for one call. They were chosen by what the compiler says for sm_90 (shared memory, registers, local memory, for
64 to 256 channels); on an H200 each took what the search's choice takes, but for the inverse of the triangles (0.50 ms
with four warps in place of 0.32), which keeps three.

FASTWEIGHT_FLA_SEARCH=all leaves every kernel as the package has it, and so does its own FLA_CACHE_MODE. What Triton has
timed is kept on disk by the package itself (FLA_CACHE_RESULTS), so a full search is paid once for each size.
"""

import functools
import importlib
import os
import warnings
from typing import Any

import torch

# Tiles, warps, stages. All else stays as the package has it.
Choice = tuple[dict[str, Any], int, int]
PLAIN: Choice = ({}, 4, 3)

_STATES: dict[str, tuple[Choice, ...]] = {
    "common.chunk_delta_h:chunk_gated_delta_rule_fwd_kernel_h_blockdim64": (({"BV": 32}, 4, 2), ({"BV": 64}, 4, 2)),
    "common.chunk_delta_h:chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": (({"BV": 32}, 2, 2), ({"BV": 32}, 4, 2)),
}
_OUTPUTS: dict[str, tuple[Choice, ...]] = {
    "common.chunk_o:chunk_fwd_kernel_o": (({"BK": 64, "BV": 64}, 4, 3), ({"BK": 128, "BV": 128}, 8, 3)),
    "common.chunk_o:chunk_bwd_kernel_dv_local": (PLAIN,),
    "common.chunk_o:chunk_bwd_kernel_dqkwg": (({}, 4, 2),),
}
KERNELS: dict[str, dict[str, tuple[Choice, ...]]] = {
    "delta_rule": {
        "common.chunk_scaled_dot_kkt:chunk_scaled_dot_kkt_fwd_kernel": (({"BK": 64}, 4, 3),),
        "utils.solve_tril:merge_16x16_to_64x64_inverse_kernel": tuple(
            ({"DOT_PRECISION": "ieee"}, warps, 3) for warps in (2, 4, 8)
        ),
        "delta_rule.wy_fast:recompute_w_u_fwd_kernel": (PLAIN,),
        "delta_rule.wy_fast:prepare_wy_repr_bwd_kernel": (({}, 2, 2),),  # the package: others are miscompiled
        **_STATES,
        **_OUTPUTS,
    },
    "gated_delta_rule": {
        "utils.cumsum:chunk_local_cumsum_scalar_kernel": (PLAIN,),
        "gated_delta_rule.chunk_fwd:chunk_gated_delta_rule_fwd_kkt_solve_kernel": (({"BK": 32}, 2, 3),),
        "gated_delta_rule.wy_fast:recompute_w_u_fwd_kernel": (PLAIN,),
        "gated_delta_rule.wy_fast:prepare_wy_repr_bwd_kernel": (({}, 4, 2),),
        **_STATES,
        **_OUTPUTS,
    },
    "kda": {
        "utils.cumsum:chunk_local_cumsum_vector_kernel": (({"BS": 32}, 4, 3),),
        "kda.chunk_intra_token_parallel:chunk_kda_fwd_kernel_intra_token_parallel": (({"BH": 4}, 4, 3),),
        "kda.chunk_intra:chunk_kda_fwd_kernel_inter_solve_fused": (({"BK": 32}, 2, 3),),
        "kda.wy_fast:recompute_w_u_fwd_kda_kernel": (PLAIN,),
        "gla.chunk:chunk_gla_fwd_kernel_o": (({"BK": 64, "BV": 64}, 4, 2),),
        "kda.chunk_bwd:chunk_kda_bwd_kernel_dAv": (PLAIN,),
        "kda.chunk_bwd:chunk_kda_bwd_kernel_wy_dqkg_fused": (({"BK": 64, "BV": 64}, 4, 2),),
        "kda.chunk_intra:chunk_kda_bwd_kernel_intra": (({}, 2, 2),),
        **_STATES,
    },
}


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def keep_few(op: str) -> None:
    """Leave the kernels of one of the package's ops the configurations of the table, once, before they first run.

    A kernel that another version of the package does not have, or has without one of them, stays as it is; a warning
    names it.
    """
    own = os.environ.get("FLA_CACHE_MODE", "disabled") != "disabled"
    if own or os.environ.get("FASTWEIGHT_FLA_SEARCH") == "all" or not on_hopper():
        return
    left = [name.split(":")[1] for name, choices in KERNELS[op].items() if not _narrow(name, choices)]
    if left:
        warnings.warn(
            f"this version of fla-core does not have the configurations chosen for {', '.join(left)}. Triton will "
            "time all that it has, which can make the first call take minutes. fla-core 0.6.0 is the version known.",
            stacklevel=2,
        )


def _narrow(name: str, choices: tuple[Choice, ...]) -> bool:
    """Whether the kernel has all of these configurations; if so, it keeps them alone."""
    tuner = _tuner(name)
    if tuner is None:
        return False
    kept = [c for c in tuner.configs if (c.kwargs, c.num_warps, c.num_stages) in choices]
    if len(kept) < len(choices):
        return False
    tuner.configs = kept
    return True


def _tuner(name: str) -> Any:
    """What chooses the kernel's configurations, below whatever else is wrapped around it; None if there is nothing."""
    from triton.runtime.autotuner import Autotuner

    module, kernel = name.split(":")
    try:
        found = getattr(importlib.import_module(f"fla.ops.{module}"), kernel)
    except (ImportError, AttributeError):
        return None
    while found is not None and not isinstance(found, Autotuner):
        found = getattr(found, "fn", None)
    return found
