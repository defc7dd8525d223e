"""Forward and forward+backward of each op, per backend: median of repeated runs, quartiles, peak memory on a GPU.

CPU: float32, chunked beside naive in one run. GPU: bfloat16 inputs at the shapes that published code is measured at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import machine, measure, print_table, write_json
from fastweight.ops import dispatch
from fastweight.ops.attention import AttentionState, attention
from fastweight.ops.delta import DeltaState, delta_rule
from fastweight.ops.lact import init_lact, lact
from fastweight.ops.ttt import TTTWeights, new_state, ttt_linear, ttt_mlp
from fastweight.state import Faults


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads} D{self.dim}"


@dataclass(frozen=True)
class Work:
    """One line of the table. make(shape, dtype, device) returns (inputs, run(inputs, backend) -> y)."""

    name: str
    op: str
    shape: Shape
    make: Callable[[Shape, torch.dtype, str], tuple[list[Tensor], Callable[[str], Tensor]]]


def draw(shape: Shape, dtype: torch.dtype, device: str, *tail: int) -> Tensor:
    return torch.randn(shape.batch, shape.length, shape.heads, *tail, device=device, dtype=dtype).requires_grad_()


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach().float(), dim=-1).to(x.dtype).requires_grad_()


def make_attention(window: int | None):
    def make(s: Shape, dtype: torch.dtype, device: str):
        q, k, v = (draw(s, dtype, device, s.dim) for _ in range(3))
        state = AttentionState.empty(s.batch, s.heads, s.dim, dtype=dtype, device=device)
        return [q, k, v], lambda backend: attention(q, k, v, state, window=window, backend=backend)[0]

    return make


def make_delta(gated: bool):
    def make(s: Shape, dtype: torch.dtype, device: str):
        q, k, v = (unit(draw(s, dtype, device, s.dim)) for _ in range(3))
        beta = torch.rand(s.batch, s.length, s.heads, device=device).requires_grad_()
        decay = (-0.1 * torch.rand(s.batch, s.length, s.heads, device=device)).requires_grad_() if gated else None
        memory = torch.zeros(s.batch, s.heads, s.dim, s.dim, device=device)
        position = torch.zeros(s.batch, dtype=torch.int64, device=device)
        state = DeltaState(memory, position, Faults.none(s.batch, device))
        leaves = [t for t in (q, k, v, beta, decay) if t is not None]
        return leaves, lambda backend: delta_rule(q, k, v, beta, state, log_decay=decay, backend=backend)[0]

    return make


def make_ttt(op: Callable[..., Any], mini_batch: int):
    def make(s: Shape, dtype: torch.dtype, device: str):
        q, k, v = (draw(s, dtype, device, s.dim) for _ in range(3))
        rate = (torch.rand(s.batch, s.length, s.heads, device=device) / s.dim).requires_grad_()
        tau = 1 / torch.arange(1, mini_batch + 1, device=device)
        weight, bias = torch.ones(s.heads, s.dim, device=device), torch.zeros(s.heads, s.dim, device=device)
        width = s.dim if op is ttt_linear else 4 * s.dim
        normal = lambda *shape: 0.02 * torch.randn(s.batch, s.heads, *shape, device=device)  # noqa: E731
        zeros = lambda *shape: torch.zeros(s.batch, s.heads, *shape, device=device)  # noqa: E731
        w2, b2 = (None, None) if op is ttt_linear else (normal(width, s.dim), zeros(1, s.dim))
        state = new_state(TTTWeights(normal(s.dim, width), zeros(1, width), w2, b2))

        def run(backend: str) -> Tensor:
            return op(q, k, v, rate, tau, weight, bias, state, chunk_size=mini_batch, backend=backend)[0]

        return [q, k, v, rate], run

    return make


def make_lact(chunk: int, **options: Any):
    def make(s: Shape, dtype: torch.dtype, device: str):
        q, k, v = (
            unit(draw(s, dtype, device, s.dim)),
            unit(draw(s, dtype, device, s.dim)),
            draw(s, dtype, device, s.dim),
        )
        rate = (1e-3 * torch.rand(s.batch, s.length, s.heads, 3, device=device)).requires_grad_()
        momentum = torch.rand(s.batch, s.length, s.heads, device=device).requires_grad_()
        w0, w1, w2 = (torch.randn(s.heads, s.dim, s.dim, device=device) * s.dim**-0.5 for _ in range(3))
        learns = options.get("update", "all")
        state = init_lact(w0, w1, w2, s.batch, chunk_size=chunk, momentum=True, update=learns, token_dtype=dtype)

        def run(backend: str) -> Tensor:
            return lact(q, k, v, rate, momentum, state, chunk_size=chunk, backend=backend, **options)[0]

        return [q, k, v, rate, momentum], run

    return make


def works(device: str) -> Iterator[Work]:
    cuda = device.startswith("cuda")
    heads = Shape(8, 2048, 32, 64) if cuda else Shape(1, 512, 4, 64)
    long = Shape(1, 32768, 24, 64) if cuda else Shape(1, 2048, 4, 64)
    fast = Shape(1, 32768, 4, 384) if cuda else Shape(1, 1024, 2, 128)
    window, chunk = (2048, 2048) if cuda else (256, 256)
    yield Work("attention, full", "attention", heads, make_attention(None))
    yield Work(f"attention, window {window}", "attention", long, make_attention(window))
    yield Work("delta rule", "delta_rule", heads, make_delta(False))
    yield Work("gated delta rule", "delta_rule", heads, make_delta(True))
    yield Work("TTT-Linear, mini-batch 16", "ttt_linear", heads, make_ttt(ttt_linear, 16))
    yield Work("TTT-MLP, mini-batch 16", "ttt_mlp", heads, make_ttt(ttt_mlp, 16))
    yield Work(f"LaCT, momentum, chunk {chunk}", "lact", fast, make_lact(chunk))
    yield Work(f"LaCT, momentum + Muon, chunk {chunk}", "lact", fast, make_lact(chunk, muon="separate"))
    yield Work(f"LaCT, only w1 learns, chunk {chunk}", "lact", fast, make_lact(chunk, update="w1"))


def time_work(work: Work, backend: str, device: str, seconds: float) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    leaves, run = work.make(work.shape, dtype, device)

    def forward() -> None:
        with torch.no_grad():
            run(backend)

    def both() -> None:
        torch.autograd.grad(run(backend).float().sum(), leaves, allow_unused=True)

    result = {"name": work.name, "op": work.op, "shape": str(work.shape), "dtype": str(dtype), "backend": backend}
    slow = {"seconds": seconds, "at_least": 3 if backend == "naive" else 5}
    return result | {"forward": measure(forward, device, **slow), "both": measure(both, device, **slow)}


def shown(result: dict[str, float]) -> str:
    memory = f", {result['peak_gib']:.1f} GiB" if "peak_gib" in result else ""
    return f"{result['median_ms']:.2f} ({result['low_ms']:.2f}-{result['high_ms']:.2f}{memory})"


def main(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: Path | None = None,
    seconds: float = 2.0,
    only: str = "",
) -> None:
    """Time every op.

    Args:
        device: Where to run; auto takes the GPU if there is one.
        json: Also write the numbers to this file.
        seconds: Time per measurement.
        only: Only works whose name contains this text.
    """
    device_name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    found, columns = [], ["op", "shape", "backend", "forward ms (quartiles)", "forward+backward ms (quartiles)"]
    for work in works(device_name):
        if only not in work.name:
            continue
        for backend in dispatch.backends(work.op):
            if backend == "naive" and device_name == "cuda":
                continue  # one launch per token and operation: minutes, and no one would run it
            result = time_work(work, backend, device_name, seconds)
            found.append(result)
            print(f"{work.name} [{backend}]: {shown(result['forward'])} / {shown(result['both'])}", flush=True)
    about = machine(device_name)
    rows = [[r["name"], r["shape"], r["backend"], shown(r["forward"]), shown(r["both"])] for r in found]
    print_table(f"{about['device']}, torch {about['torch']}, {about['threads']} threads", columns, rows)
    write_json(json, {"machine": about, "results": found})


if __name__ == "__main__":
    tyro.cli(main)
