"""Measure a function, describe the machine, print a table, write JSON."""

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastweight.files import write_text


def measure(run: Callable[[], object], device: str, *, seconds: float = 2.0, at_least: int = 5) -> dict[str, float]:
    """Median and quartiles in milliseconds of repeated calls, after two calls of warm-up; peak memory on a GPU."""
    cuda = device.startswith("cuda")
    run()
    run()
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, began = [], time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - began < seconds and len(times) < 200):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(times, n=4)
    result = {"median_ms": statistics.median(times), "low_ms": low, "high_ms": high, "runs": len(times)}
    if cuda:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else (platform.processor() or platform.machine())
    return {
        "commit": done.stdout.strip() or "unknown",
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, so that the output can be pasted into the docs."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}\n")
    for row in (list(columns), ["-" * w for w in widths], *cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
    sys.stdout.flush()


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        write_text(path, json.dumps(data, indent=1) + "\n")
