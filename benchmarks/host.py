"""What a call of TTT-Linear or TTT-MLP asks of the host: kernels, torch operations that launch, allocations, views.

Counted on a CPU with kernels that do nothing, so it takes no GPU. With one, the host's time until a call returns that
began on an idle device is measured, too.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ops
from benchmarks.ops import draw
from benchmarks.timing import machine, print_table, write_json
from fastweight.ops.examples import Example, Shape, examples

COLUMNS = ["op", "pass", "kernels", "torch launches", "allocations", "views", "host ms"]
SHAPE = Shape(8, 2048, 32, 64)


class Tally(TorchDispatchMode):
    """Counts what torch is asked for: "allocation", "view", or else "torch launch"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.split("::")[-1]
        kind = "allocation" if "empty" in name else "view" if func.is_view else "torch launch"
        self.found[kind] += 1
        return func(*args, **kwargs or {})


def passes(example: Example, device: str, shape: Shape) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with the backward pass to every input, through the kernels."""
    inputs = draw(example, shape, device)
    calls = ops.passes(lambda: example.run(inputs, "triton"), inputs)
    return {"forward": calls["forward"], "forward+backward": calls["both"]}


def count(example: Example, shape: Shape) -> dict[str, Counter[str]]:
    """Pass → how many of which kind, of a second call."""
    tally = Tally()

    def kernel(*args: Any) -> None:
        tally.found["kernel"] += 1

    found = {}
    with (
        patch("fastweight.ops.ttt.layout.launch", kernel),
        patch("fastweight.ops.faults.launch", kernel),
        patch("fastweight.ops.ttt.triton.why_no_kernels", lambda x: None),
    ):
        for name, run in passes(example, "cpu", shape).items():
            run()
            tally.found = Counter()
            with tally:
                run()
            found[name], tally.found = tally.found, Counter()
    return found


def host_ms(run: Callable[[], object], times: int = 50) -> float:
    """Median milliseconds until a call returns that began on an idle device."""
    found = []
    for _ in range(times + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found[3:])


def main(json: Path | None = None) -> None:
    """Count what a call of each TTT op asks of the host.

    Args:
        json: Also write the numbers to this file.
    """
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for name, example in examples(window=1, mini_batch=16, chunk=1).items():
        if not name.startswith("TTT"):
            continue
        times = {part: host_ms(run) for part, run in passes(example, device, SHAPE).items()} if device == "cuda" else {}
        for part, counted in count(example, SHAPE).items():
            found.append({"name": name, "pass": part, **counted, "host_ms": times.get(part)})
    write_json(json, {"machine": machine(device), "results": found})
    kinds = ("kernel", "torch launch", "allocation", "view")
    shown = [f"{r['host_ms']:.3f}" if r["host_ms"] else "–" for r in found]
    rows = [[r["name"], r["pass"], *(r.get(kind, 0) for kind in kinds), ms] for r, ms in zip(found, shown, strict=True)]
    print_table(f"{machine(device)['device']}, torch {torch.__version__}", COLUMNS, rows)


if __name__ == "__main__":
    tyro.cli(main)
