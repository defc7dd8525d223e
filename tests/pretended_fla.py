"""flash-linear-attention as an H100 would see it, on a machine without a GPU: which kernels run, with what choices.

Run as a program, because the process of the tests may interpret. Prints, as JSON, what is left to the kernels of a call
with gradients of each op of the package that has a table: name → configurations; or, with the argument DIM, what each
of those left needs for heads of DIM channels.
"""

import importlib
import json
import os
import sys
import warnings
from typing import Any

import torch
from ahead_of_time import SHARED_LIMIT, _resources
from pretended_gpu import Device
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner

from fastweight.ops.delta import fla_tuning


def pretend() -> None:
    Device.get_device_properties = lambda self, device: {"max_shared_mem": SHARED_LIMIT}  # type: ignore[method-assign]
    driver.set_active(Device())  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda *args: "NVIDIA H100"
    torch.cuda.get_device_capability = lambda *args: (9, 0)


def call(op: str, dim: int) -> None:
    """Forward and backward; the kernels compute nothing."""

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(2, *shape, dtype=dtype, requires_grad=True)

    decay = {"delta_rule": [], "gated_delta_rule": [()], "kda": [(dim,)]}[op]
    tokens = [draw(128, 4, dim), draw(128, 4, dim), draw(128, 4, dim)]
    tokens += [draw(128, 4, *size, dtype=torch.float32) for size in (*decay, ())]
    run = getattr(importlib.import_module(f"fla.ops.{op}"), f"chunk_{op}")
    start = draw(4, dim, dim, dtype=torch.float32)
    y, after = run(*tokens, scale=1.0, initial_state=start, output_final_state=True)
    (y.float().sum() + after.sum()).backward()


def seen(op: str, dim: int, *, compiles: bool = False) -> dict[str, list]:
    """Kernel → its configurations, or what they need, of every kernel that runs."""
    found: dict[str, list] = {}

    def run(self: Any, *args: Any, **options: Any) -> None:
        kept = found.setdefault(self.base_fn.__name__, [])
        if not compiles:
            kept[:] = [str(c) for c in self.configs]
            return
        for config in self.configs:
            binary = self.fn.run(*args, **options, **config.all_kwargs())
            kept.append({"shared": binary.metadata.shared, **_resources(binary)})

    for tuner in (Autotuner, *Autotuner.__subclasses__()):
        tuner.run = run  # type: ignore[method-assign]
    call(op, dim)
    return found


def choices() -> dict[str, Any]:
    """all: of the package; searching, cached: where the user wants its own search; left; said: of a missing kernel."""
    keep_few = fla_tuning.keep_few.__wrapped__
    found: dict[str, Any] = {"all": {op: seen(op, 64) for op in fla_tuning.KERNELS}}
    for case, variable, value in (
        ("searching", "FASTWEIGHT_FLA_SEARCH", "all"), ("cached", "FLA_CACHE_MODE", "strict"), ("left", "UNUSED", ""),
    ):  # fmt: skip
        os.environ[variable] = value
        for op in fla_tuning.KERNELS:
            keep_few(op)
        del os.environ[variable]
        found[case] = {op: seen(op, 64) for op in fla_tuning.KERNELS}
    delattr(sys.modules["fla.ops.kda.wy_fast"], "recompute_w_u_fwd_kda_kernel")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        keep_few("kda")
    return {**found, "said": [str(w.message) for w in said]}


def needs(dim: int) -> dict[str, Any]:
    for op in fla_tuning.KERNELS:
        fla_tuning.keep_few(op)
    return {op: seen(op, dim, compiles=True) for op in ("delta_rule", "kda")}


if __name__ == "__main__":
    pretend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in fla_tuning.KERNELS:
            importlib.import_module(f"fla.ops.{name}")
    print(json.dumps(needs(int(sys.argv[1])) if sys.argv[1:] else choices()))
