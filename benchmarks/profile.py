"""Where the time of a call goes on a GPU: each kernel's, and all together."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

SHOWN = 24


def profiled(run: Callable[[], object]) -> dict[str, Any]:
    """device_ms, launches: of all kernels; kernels: [name, launches, ms] of the longest, longest first. Needs a GPU,
    and a call that was made before.

    A process that has profiled once seems to launch everything slower from then on: what it times, it times before.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    rows = sorted(((k.key, k.count, k.self_device_time_total / 1e3) for k in kernels), key=lambda row: -row[2])
    total, launches = sum(row[2] for row in rows), sum(row[1] for row in rows)
    return {"device_ms": total, "launches": launches, "kernels": rows[:SHOWN]}


def lines(found: dict[str, Any]) -> list[str]:
    """What `profiled` found, to be read."""
    first = f"  device {found['device_ms']:.2f} ms in {found['launches']} launches"
    return [first, *(f"  {ms:9.3f} ms {count:6d} × {name[:100]}" for name, count, ms in found["kernels"])]
