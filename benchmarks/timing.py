"""Measure a function, describe the machine, print a table, write JSON."""

import contextlib
import gc
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastweight.devices import package_version
from fastweight.files import write_text

MOST_RUNS = 200
T = TypeVar("T")


def measure(run: Callable[[], object], device: str, *, seconds: float = 2.0, at_least: int = 5) -> dict[str, float]:
    """Median and quartiles in milliseconds of repeated calls, after two calls of warm-up.

    On a GPU calls are queued one behind the other, as in training, where the host runs ahead; `alone_ms` is the median
    of calls that each find the device idle, the host's launches included, and `host_ms` what the host itself needs.
    Also the peak memory there, that of tensors and all that is taken from the device.
    """
    cuda = device.startswith("cuda")
    with torch.cuda.device(device) if cuda else contextlib.nullcontext():  # events are those of the current GPU
        return _measured(run, cuda, seconds, at_least)


def _measured(run: Callable[[], object], cuda: bool, seconds: float, at_least: int) -> dict[str, float]:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    run()
    run()
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    alone, host = [], []
    if cuda:
        alone, host = zip(*_repeated(_alone_on_gpu, run, seconds / 4, at_least), strict=True)
        times = _in_a_row(run, seconds, at_least, statistics.median(alone))
    else:
        times = _repeated(_once, run, seconds, at_least)
    low, _, high = statistics.quantiles(times, n=4)
    result = {"median_ms": statistics.median(times), "low_ms": low, "high_ms": high, "runs": len(times)}
    if cuda:
        result["alone_ms"], result["host_ms"] = statistics.median(alone), statistics.median(host)
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        # Also what recorded passes keep for themselves, and what the allocator holds without need.
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def _repeated(
    once: Callable[[Callable[[], object]], T], run: Callable[[], object], seconds: float, at_least: int
) -> list[T]:
    times, began = [], time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - began < seconds and len(times) < MOST_RUNS):
        times.append(once(run))
    return times


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _alone_on_gpu(run: Callable[[], object]) -> tuple[float, float]:
    """By the device's own clock, the host's launches included where the device waits for them; and the host's part."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    host = _once(run)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def _in_a_row(run: Callable[[], object], seconds: float, at_least: int, expected_ms: float) -> list[float]:
    """As many calls as fit into the time, queued without a wait; one ends where the next begins."""
    count = min(max(int(1e3 * seconds / expected_ms), at_least), MOST_RUNS)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]


class Ceilings(NamedTuple):
    """What the machine reaches at best: a large matrix product, and a large copy (bytes read plus bytes written)."""

    flops_per_second: float
    bytes_per_second: float

    def __str__(self) -> str:
        return f"matrix product {self.flops_per_second / 1e12:.3g} TFLOP/s, copy {self.bytes_per_second / 1e9:.4g} GB/s"


def ceilings(device: str) -> Ceilings:
    """Measured here and now: bfloat16 on a GPU, float32 on a CPU."""
    cuda = device.startswith("cuda")
    size, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, seconds=1.0)["median_ms"]
    source = torch.randn(1 << (30 if cuda else 26), device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, seconds=1.0)["median_ms"]
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(1e3 * 2 * size**3 / product, 1e3 * moved / copy)


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    here, ask = Path(__file__).parent, ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(ask, capture_output=True, text=True, check=False, cwd=here)
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else (platform.processor() or platform.machine())
    )
    return {
        "commit": done.stdout.strip() or "unknown",
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "fla-core": package_version("fla-core"),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(columns, *cells, strict=True)]
    lines = (list(columns), ["-" * w for w in widths], *cells)
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A title and a Markdown table on stdout."""
    print(f"\n{title}\n\n{table(columns, rows)}", flush=True)


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        write_text(path, json.dumps(data, indent=1) + "\n")
