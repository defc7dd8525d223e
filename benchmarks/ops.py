"""Forward and forward+backward of each op, per backend and beside peers: median, quartiles, memory, distance to limits.

CPU: float32, chunked beside naive in one run. GPU: bfloat16 inputs at the shapes that published code is measured at;
the two limits (largest matrix product, device copy) are measured in the same run.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.ahead import side_by_side
from benchmarks.costs import Cost, cost
from benchmarks.peers import peers
from benchmarks.profile import lines, profiled
from benchmarks.timing import Ceilings, ceilings, machine, measure, print_table, write_json
from fastweight.ops import dispatch
from fastweight.ops.examples import Example, Inputs, Shape, examples
from fastweight.ops.lact import recorded

COLUMNS = ["op", "shape", "by", "forward ms (quartiles)", "forward+backward ms (quartiles)", "TFLOP/s", "floor ms"]


def works(device: str) -> Iterator[tuple[str, Shape, Example, dict[str, int]]]:
    """(name, shape, example, sizes) of everything that is timed."""
    cuda = device.startswith("cuda")
    heads = Shape(8, 2048, 32, 64) if cuda else Shape(1, 512, 4, 64)
    long = Shape(1, 32768, 24, 64) if cuda else Shape(1, 2048, 4, 64)
    fast = Shape(1, 32768, 4, 384) if cuda else Shape(1, 1024, 2, 128)
    sizes = {"window": 2048 if cuda else 256, "mini_batch": 16, "chunk": 2048 if cuda else 256}
    for name, example in examples(**sizes, muon_dtype="bfloat16" if cuda else "float32").items():
        shape = long if "window" in name else fast if name.startswith("LaCT") else heads
        yield name, Shape(1, shape.length, 16, 64) if name.startswith("In-Place") and cuda else shape, example, sizes


def draw(example: Example, shape: Shape, device: str) -> Inputs:
    """Random inputs of the example: tokens in bfloat16 on a GPU, all else in float32."""
    torch.manual_seed(0)
    tokens, others = example.draw(shape, device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    inputs = {name: x.to(dtype) for name, x in tokens.items()} | others
    return {name: x.requires_grad_() for name, x in inputs.items()}


def compile_kernels(name: str) -> None:
    """Run the work whose name begins so once by our Triton kernels, both ways; in a process of its own.

    A small problem needs the same kernels: they do not depend on lengths and batches.
    """
    (name, shape, example, sizes), *_ = [work for work in works("cuda") if work[0].startswith(name)]
    length = 2 * sizes["chunk"] if name.startswith("LaCT") else 4 * sizes["mini_batch"]
    inputs = draw(example, Shape(1, length, *shape[2:]), "cuda")
    y = example.run(inputs, "triton")
    torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), allow_unused=True)
    torch.cuda.synchronize()


def compile_ahead(names: Iterable[str], processes: int, until: float) -> dict[str, str]:
    """`compile_kernels` for all of them, side by side: one after the other takes minutes. What the failed ones said."""
    code = "from benchmarks.ops import compile_kernels; compile_kernels"
    return side_by_side({name: f"{code}({name!r})" for name in names}, processes, until)


def passes(run: Callable[[], Tensor], inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with the backward pass to every input ("both")."""
    leaves = list(inputs.values())
    weight = torch.randn_like(run().detach())

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), leaves, weight, allow_unused=True)

    return {"forward": forward, "both": both}


def runners(name: str, example: Example, inputs: Inputs, device: str, sizes: dict[str, int]) -> Iterator[tuple]:
    """(who, run) of every backend that takes these inputs, then of every peer."""
    for backend in dispatch.backends(example.op):
        if backend == "naive" and device.startswith("cuda"):
            continue  # one launch per token and operation: minutes, and no one would run it
        try:
            with torch.no_grad():
                example.run(inputs, backend)
        except ValueError as refusal:
            print(f"{name} [{backend}]: not run: {refusal}", flush=True)
            continue
        yield backend, lambda backend=backend: example.run(inputs, backend)
    for peer, run in peers(name, device, window=sizes["window"], mini_batch=sizes["mini_batch"]):
        yield peer, lambda run=run: run(inputs)


def shown(result: dict[str, float]) -> str:
    memory = f", {result['peak_gib']:.1f} GiB" if "peak_gib" in result else ""
    memory += f", {result['reserved_gib']:.1f} reserved" if "reserved_gib" in result else ""
    alone = f", alone {result['alone_ms']:.2f}" if "alone_ms" in result else ""
    alone += f", host {result['host_ms']:.2f}" if "host_ms" in result else ""
    return f"{result['median_ms']:.2f} ({result['low_ms']:.2f}-{result['high_ms']:.2f}{alone}{memory})"


def against(limit: Ceilings, work: Cost, result: dict[str, float]) -> dict[str, float]:
    """Achieved TFLOP/s and GB/s by the least work, and the time below which no version can come."""
    seconds = result["median_ms"] / 1e3
    floor = max(work.flops / limit.flops_per_second, work.bytes / limit.bytes_per_second)
    return {
        "tflops": work.flops / seconds / 1e12, "gb_per_second": work.bytes / seconds / 1e9, "floor_ms": 1e3 * floor,
        "flops": work.flops, "bytes": work.bytes,
    }  # fmt: skip


def time_work(
    name: str, shape: Shape, example: Example, sizes: dict[str, int], device: str, seconds: float, limit: Ceilings
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One record per backend and peer: milliseconds of both `passes`."""
    inputs = draw(example, shape, device)
    element = 2 if device.startswith("cuda") else 4
    for who, run in runners(name, example, inputs, device, sizes):
        slow = {"seconds": seconds, "at_least": 3 if who == "naive" else 5}
        try:
            result: dict[str, Any] = {p: measure(call, device, **slow) for p, call in passes(run, inputs).items()}
        except (RuntimeError, TypeError) as error:  # a peer that does not run here says so, the table goes on
            print(f"{name} [{who}]: failed: {str(error).splitlines()[0]}", flush=True)
            continue
        for part, found in result.items():
            work = cost(
                name, shape, element, chunk=sizes["chunk"], window=sizes["window"], backward=part == "both"
            )  # fmt: skip
            found |= against(limit, work, found)
        print(f"{name} [{who}]: {shown(result['forward'])} / {shown(result['both'])}", flush=True)
        yield {"name": name, "op": example.op, "shape": str(shape), "by": who, **result}


def profile_work(
    name: str, shape: Shape, example: Example, sizes: dict[str, int], device: str, records: list[dict[str, Any]]
) -> None:  # fmt: skip
    """Add to the records of this work where the time of both `passes` goes."""
    inputs, timed = draw(example, shape, device), {r["by"]: r for r in records if r["name"] == name}
    for who, run in runners(name, example, inputs, device, sizes):
        for part, call in passes(run, inputs).items() if who in timed else ():
            call()
            timed[who][f"profile_{part}"] = seen = profiled(call)
            print("\n".join([f"{name} [{who}], {part}:", *lines(seen)]), flush=True)


def time_all(
    device: str, seconds: float, only: str, limit: Ceilings, save: Callable[[list[dict[str, Any]]], None], *,
    profile: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The records of all works whose name contains `only`, saved after each.

    After a profile launches seem to take longer (a LaCT call of 3.4 ms took 4.2), so everything is timed first.
    """
    found: list[dict[str, Any]] = []
    chosen = [work for work in works(device) if only in work[0]]
    for work in chosen:
        recorded.forget()
        found += time_work(*work, device, seconds, limit)
        save(found)
    for work in chosen if profile else ():
        recorded.forget()
        profile_work(*work, device, found)
        save(found)
    return found


def row(r: dict[str, Any]) -> list[str]:
    parts = (r["forward"], r["both"])
    known = all("tflops" in part for part in parts)  # tables from before there were limits do not
    rate = " / ".join(f"{part['tflops']:.3g}" for part in parts) if known else "–"
    floor = " / ".join(f"{part['floor_ms']:.2g}" for part in parts) if known else "–"
    return [r["name"], r["shape"], r["by"] if "by" in r else r["backend"], *map(shown, parts), rate, floor]


def main(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: Path | None = None,
    seconds: float = 2.0,
    only: str = "",
    profile: bool = False,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Time every op.

    Args:
        device: Where to run; auto takes the GPU if there is one.
        json: Also write the numbers to this file.
        seconds: Time per measurement.
        only: Only works whose name contains this text.
        profile: Also say where the time goes, kernel by kernel; on a GPU.
        processes: On a GPU, compile so many works' kernels at a time before anything is timed.
    """
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if profile and where != "cuda":
        raise SystemExit("--profile looks at the kernels of a GPU, and there is none. Leave it out.")
    if where == "cuda":
        ours = [work[0] for work in works(where) if only in work[0] and "triton" in dispatch.backends(work[2].op)]
        for name, words in compile_ahead(ours, processes, time.monotonic() + 300).items():
            print(f"{name}: {words}", flush=True)
    limit = ceilings(where)

    def save(found: list[dict[str, Any]]) -> None:
        write_json(json, {"machine": machine(where), "ceilings": limit._asdict(), "results": found})

    found = time_all(where, seconds, only, limit, save, profile=profile)
    about = machine(where)
    title = f"{about['device']}, torch {about['torch']}, {about['threads']} threads; {limit}"
    print_table(title, COLUMNS, [row(r) for r in found])


if __name__ == "__main__":
    tyro.cli(main)
