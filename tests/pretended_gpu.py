"""Triton's launches on a machine without a GPU: kernels are compiled for sm_90, and what would be started is kept.

Run as a program, because the process of the tests may interpret: prints, as JSON, for several launches of one kernel by
`fastweight.ops.launch`, whether Triton was asked, and whether the kernel got what Triton gives it.
"""

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

STARTED: list[list] = []


class Launcher:
    """In the place of the one that talks to the driver."""

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest]
        STARTED.append([id(function), (x, y, z), [a for a in values if isinstance(a, (int, float, str))]])


class Device:
    """What Triton asks of the driver, answered as by an H100 that never runs anything."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        self.utils = self

    def load_binary(self, *args: Any) -> tuple:
        return object(), 1, 255, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches() -> list[dict]:
    """case, by_triton, same: see above. Each second launch of a kind needs no Triton, if its addresses are aligned."""
    from fastweight.ops.launch import launch
    from fastweight.ops.ttt.kernels_shared import shared_totals

    run, asked, found = shared_totals.run, [], []
    shared_totals.run = lambda *args, **options: asked.append(1) or run(*args, **options)

    def record(case: str, dtype: torch.dtype, heads: int, rows: int, offset: int = 0) -> None:
        given = [torch.zeros(20_000, dtype=torch.float32)[offset:], *torch.zeros(3, 512, dtype=dtype)]
        constants, options = {"D": 8, "BLOCK_D": 16, "CHUNK": 4}, {"num_warps": 1}
        STARTED.clear()
        asked.clear()
        launch(shared_totals, (heads + 4,), given, (rows, heads), constants, options)
        by_triton = bool(asked)
        shared_totals[(heads + 4,)](*given, rows, heads, **constants, **options)
        found.append({"case": case, "by_triton": by_triton, "same": STARTED[0] == STARTED[1]})

    half, single = torch.bfloat16, torch.float32
    record("first", half, 2, 3)
    record("again, more rows", half, 2, 5)
    record("another dtype", single, 2, 3)
    record("16 heads", half, 16, 3)
    record("1 head", half, 1, 3)
    record("3 heads", half, 3, 5)
    record("not aligned", half, 2, 3, offset=1)
    record("not aligned, again", half, 2, 3, offset=1)
    record("16 heads, again", half, 16, 3)
    return found


if __name__ == "__main__":
    driver.set_active(Device())  # type: ignore[attr-defined]
    print(json.dumps(launches()))
