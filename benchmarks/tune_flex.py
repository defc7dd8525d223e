"""Which tiles suit the kernels of backend "flex" on this GPU: each candidate's time, and its distance from torch's own.

What wins belongs into `TILES` of fastweight/ops/attention/flex.py. Every candidate is compiled anew: some ten seconds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
import tyro
from torch import Tensor

from benchmarks.ops import shown
from benchmarks.timing import machine, measure, print_table, write_json
from fastweight.ops.attention import AttentionState, attention, flex

Tiles = dict[str, int]
COLUMNS = ["pass", "tiles", "ms (quartiles)", "distance from torch's own"]
# The first row of each is what torch 2.11 takes by itself for 16-bit inputs of 64 channels on an H100. No row spills
# registers there, compiled ahead of time. BLOCK_M1 divides BLOCK_N1 and BLOCK_N2 divides BLOCK_M2, or nothing compiles.
FORWARD = ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps"), [
    (128, 128, 3, 4), (128, 128, 2, 4), (128, 128, 2, 8), (128, 128, 3, 8), (128, 64, 3, 4), (128, 64, 2, 4),
    (128, 64, 3, 8), (64, 128, 3, 4), (64, 64, 3, 4),
]  # fmt: skip
BACKWARD = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps"), [
    (64, 128, 128, 64, 3, 8), (64, 128, 128, 64, 2, 8), (64, 128, 128, 64, 1, 8), (64, 128, 128, 32, 3, 8),
    (32, 128, 128, 64, 3, 8), (32, 128, 128, 32, 3, 8), (64, 64, 128, 64, 2, 8), (64, 64, 64, 64, 2, 8),
    (64, 64, 64, 64, 2, 4), (64, 64, 64, 64, 3, 4), (32, 64, 64, 64, 3, 4), (32, 64, 64, 32, 3, 4),
]  # fmt: skip
FLAGS = ("USE_TMA", "PRESCALE_QK")  # tried with the first row; the second one rounds the queries once more


def candidates(part: Literal["forward", "backward"]) -> Iterator[Tiles]:
    """Kernel options of one pass: torch's own, the tables' rows, the flags."""
    (names, rows), prefix = (FORWARD, "fwd_") if part == "forward" else (BACKWARD, "bwd_")
    tiles = [{prefix + name: size for name, size in zip(names, row, strict=True)} for row in rows]
    yield from ({}, *tiles, *(tiles[0] | {prefix + flag: True} for flag in FLAGS))


def run_once(leaves: list[Tensor], window: int, weight: Tensor, backward: bool) -> list[Tensor]:
    """The output, or the gradients of the inputs."""
    q, k, v = leaves
    batch, _, heads, dim = k.shape
    state = AttentionState.empty(batch, heads, dim, dtype=k.dtype, device=k.device)
    with torch.set_grad_enabled(backward):
        y, _ = attention(q, k, v, state, window=window, backend="flex")
    return list(torch.autograd.grad(y, leaves, weight)) if backward else [y]


def try_all(
    parts: list[Literal["forward", "backward"]], key: tuple[tuple[int, int], int],
    run: Callable[[bool], list[Tensor]], device: str, seconds: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One record per candidate: milliseconds of the forward pass, or of both. Those that fail say why."""
    for part in parts:
        want: list[Tensor] = []
        for tiles in candidates(part):
            torch._dynamo.reset()
            flex.kernel.cache_clear()
            flex.TILES[key] = tiles
            record: dict[str, Any] = {"pass": part, "tiles": tiles}
            try:
                got = [x.double() for x in run(part == "backward")]
                want = want or got
                error = max(float((x - y).norm() / y.norm()) for x, y in zip(got, want, strict=True))
                time = measure(lambda part=part: run(part == "backward"), device, seconds=seconds)
                record |= {"distance": error, "time": time}
            except Exception as error:  # a compiler may give up on tiles in any way; the next ones may do
                record["failed"] = (str(error).strip() or type(error).__name__).splitlines()[-1][:120]
            print(*row(record), flush=True)
            yield record


def row(record: dict[str, Any]) -> list[str]:
    tiles = " ".join(f"{name[4:]}={size}" for name, size in record["tiles"].items()) or "torch's own"
    if "failed" in record:
        return [record["pass"], tiles, "failed", record["failed"]]
    return [record["pass"], tiles, shown(record["time"]), f"{record['distance']:.0e}"]


def main(
    part: Literal["forward", "backward", "both"] = "both", window: int = 2048, length: int = 32768, batch: int = 1,
    heads: int = 24, kv_heads: int = 24, dim: int = 64, seconds: float = 0.5, json: Path | None = None,
) -> None:  # fmt: skip
    """Time every candidate for one shape in bfloat16.

    Args:
        part: Tiles of which pass; those of the backward pass are timed with a forward pass by torch's own.
        window: Tokens that a token sees.
        length: Tokens per row.
        batch: Rows.
        heads: Query heads.
        kv_heads: Key heads.
        dim: Channels per head.
        seconds: Time per measurement.
        json: Also write the numbers to this file.
    """
    if not torch.cuda.is_available():
        raise SystemExit("tune_flex times kernels and needs a CUDA GPU; there is none here.")
    torch.manual_seed(0)
    shapes = [(batch, length, n, dim) for n in (heads, kv_heads, kv_heads)]
    leaves = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    weight = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    parts: list[Literal["forward", "backward"]] = ["forward", "backward"] if part == "both" else [part]
    found = []
    key = (torch.cuda.get_device_capability(), dim)
    for record in try_all(parts, key, lambda both: run_once(leaves, window, weight, both), "cuda", seconds):
        found.append(record)
        write_json(json, {"machine": machine("cuda"), "shape": [*shapes[0], kv_heads, window], "results": found})
    found.sort(key=lambda r: (r["pass"] == "backward", r["time"]["median_ms"] if "time" in r else float("inf")))
    print_table(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", COLUMNS, [row(r) for r in found])


if __name__ == "__main__":
    tyro.cli(main)
