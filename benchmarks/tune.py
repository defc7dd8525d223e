"""Other launch options for the kernels, tried on the GPU of this machine: which change of a table is worth it?

One entry of one table is changed at a time, then the best value of each is tried together. A change must give the same
values (to rounding) as the tables do; then forward and backward pass are recorded as a CUDA graph and replayed in turns
with the same graph of the unchanged tables, so that the device's clocks are the same for both and the host is left out.
A change that does not compile or run is reported, the others go on. Tables are in fastweight/ops/ttt/layout.py,
fastweight/ops/lact/fused.py and fused_muon.py.
"""

import copy
import importlib
import json as texts
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from benchmarks.ahead import side_by_side
from benchmarks.ops import compile_ahead, compile_kernels, draw, works
from benchmarks.timing import machine, print_table, write_json
from fastweight.ops.lact import recorded
from fastweight.ops.ttt.layout import LAUNCH, MLP_DESIGN, block

TTT, LACT = "fastweight.ops.ttt.layout", "fastweight.ops.lact."
DEVICE = "cuda"
WIDTH = block(64)  # of the TTT tables' tiles, at the shapes that are timed
REGISTERS, MOST_REGISTERS = (128, 168, 255), 255
LIMIT = 1e-2  # relative RMS from the values of the unchanged tables: what gradients in bfloat16 may differ by
WORTH = 1.01  # times as fast: less is noise, and is not put together with the others
COLUMNS = ["work", "change", "ms", "ms unchanged", "gain", "distance"]


class Change(NamedTuple):
    """work: the beginning of the benchmark's name that shows it. path: module, table, keys. value: in place of it."""

    work: str
    path: tuple
    value: Any

    def __str__(self) -> str:
        module, table, *keys = self.path
        return f"{module.split('.')[-1]}.{table}{''.join(f'[{key}]' for key in keys)} = {self.value}"


def plan(only: str = "") -> list[Change]:
    """Every change that is tried by itself; only: those whose work or text contains it."""
    found = dict.fromkeys([*_launches(), *_sizes(), *_lact()])
    return [c for c in found if present(c.path) != c.value and (only in str(c) or only in c.work)]


def _launches() -> Iterator[Change]:
    """Warps and stages beside the present ones, and bounds of registers, of each kernel that reads whole sequences."""
    for kernel, by_width in LAUNCH.items():
        work = "TTT-Linear" if kernel.startswith("linear") else "TTT-MLP"
        if kernel.endswith("step") or not _runs(kernel):
            continue
        warps, stages = by_width[WIDTH]
        few = [(1, stages)] if kernel == "linear_reads" else []  # many small programs
        near = [(warps // 2, stages), (2 * warps, stages), (warps, stages + 1), (warps, max(1, stages - 1))]
        for value in [*few, *near]:
            if 1 <= value[0] <= 8:
                yield Change(work, (TTT, "LAUNCH", kernel, WIDTH), value)
        for registers in REGISTERS:
            if registers != MOST_REGISTERS or present((TTT, "REGISTERS", kernel, WIDTH)):
                yield Change(work, (TTT, "REGISTERS", kernel, WIDTH), registers)


def _runs(kernel: str) -> bool:
    """Whether calls of the benchmark's size use this kernel: of TTT-MLP's designs one for each pass."""
    design = MLP_DESIGN["forward" if "forward" in kernel else "backward"]
    if kernel == "mlp_end_held":
        return False  # no long work
    return not kernel.startswith("mlp") or kernel.endswith("_held") == (design != "streamed")


def _sizes() -> Iterator[Change]:
    for part in ("forward", "backward"):
        yield from (Change("TTT-MLP", (TTT, "MLP_DESIGN", part), design) for design in ("streamed", "held"))
    for work in ("TTT-Linear", "TTT-MLP"):
        yield from (Change(work, (TTT, "KEEP_EVERY"), every) for every in (4, 8, 16, 32))
        yield from (Change(work, (TTT, "REPLAY_BYTES"), 1 << power) for power in (28, 30, 32))
    yield Change("TTT-Linear", (TTT, "MARKS"), torch.int8)  # TTT-MLP's walk does not fit then
    yield from (Change("TTT-MLP", (TTT, "READ_AT_ONCE"), step) for step in (1, 4, 16))
    yield from (Change("TTT-MLP", (TTT, "HIDDEN_BLOCK"), size) for size in (32, 64, 128))


def _lact() -> Iterator[Change]:
    work, pieces, muon = "LaCT, momentum + Muon", LACT + "fused", LACT + "fused_muon"
    for tile in ((128, 64, 4, 3), (128, 32, 8, 4), (128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2)):
        yield Change(work, (muon, "MUON_TILES", 2), tile)
    yield from (Change(work, (muon, "FLAT"), size) for size in (512, 1024, 2048, 4096))
    yield from (Change(work, (pieces, "FLAT"), size) for size in (512, 1024, 2048, 4096))
    yield from (Change(work, (pieces, "HIDDEN_TILE"), tile) for tile in ((4, 128), (8, 128), (16, 128), (4, 256)))
    yield from (Change(work, (pieces, "SWAP_TILE"), tile) for tile in ((1024, 128), (4096, 128), (8192, 128)))
    yield from (Change(work, (pieces, "FINITE_TILE"), size) for size in (2048, 8192, 16384))
    yield from (Change(work, (pieces, "ROWS"), rows) for rows in (1, 2, 4, 8))


def present(path: tuple) -> Any:
    """What the table holds now, or None."""
    module, table, *keys = path
    found = vars(importlib.import_module(module))[table]
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


@contextmanager
def changed(changes: Sequence[Change]) -> Iterator[None]:
    """The tables with these changes, inside; after it as they were, whatever happened."""
    modules = {(c.path[0], c.path[1]) for c in changes}
    before = {(module, name): vars(importlib.import_module(module))[name] for module, name in modules}
    try:
        for (module, name), table in before.items():
            setattr(sys.modules[module], name, copy.deepcopy(table))
        for change in changes:
            _put(change)
        yield
    finally:
        for (module, name), table in before.items():
            setattr(sys.modules[module], name, table)


def _put(change: Change) -> None:
    (module, name, *keys), old, value = change.path, present(change.path), change.value
    value = type(old)(*value) if hasattr(old, "_fields") else value
    if not keys:
        setattr(sys.modules[module], name, value)
        return
    table = vars(sys.modules[module])[name]
    for key in keys[:-1]:
        table = table.setdefault(key, {})
    table[keys[-1]] = value


class Work:
    """One benchmark: its values and its time under the tables as they are at the call."""

    def __init__(self, name: str):
        recorded.ENABLED = False  # a call that is replayed would not see changed tables
        (shape, self._example), *_ = [w[1:3] for w in works(DEVICE) if w[0].startswith(name)]
        self._inputs = draw(self._example, shape, DEVICE)
        self._weight = torch.randn_like(self.run()[0])

    def run(self) -> list[Tensor]:
        """y and the gradients of all inputs."""
        y = self._example.run(self._inputs, "triton")
        weight = getattr(self, "_weight", torch.ones_like(y))
        found = torch.autograd.grad(y, list(self._inputs.values()), weight, allow_unused=True)
        return [y.detach(), *(g for g in found if g is not None)]

    def record(self) -> torch.cuda.CUDAGraph:
        """Forward and backward pass as a graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels must be loaded and libraries have chosen theirs before a recording
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph


def in_turns(graphs: Sequence[torch.cuda.CUDAGraph], seconds: float = 0.4) -> list[float]:
    """Median milliseconds of each graph's replay, one after the other again and again."""
    times: list[list[float]] = [[] for _ in graphs]
    began = time.perf_counter()
    while len(times[0]) < 7 or (time.perf_counter() - began < seconds and len(times[0]) < 100):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
    return [statistics.median(found) for found in times]


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative RMS difference; infinite where something is not finite."""
    errors = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30) for a, b in zip(got, want, strict=True)
    ]
    return max(float(error) if error.isfinite() else float("inf") for error in errors)


class Bench:
    """Tries changes of one work against the unchanged tables."""

    def __init__(self, name: str):
        self._work = Work(name)
        self._want, self._graph = self._work.run(), self._work.record()

    def __call__(self, changes: Sequence[Change]) -> dict[str, float]:
        with changed(changes):
            off = distance(self._work.run(), self._want)
            if off > LIMIT:
                raise ValueError(f"gives other values: {off:.1e} from those of the unchanged tables")
            graph = self._work.record()
        ms, unchanged = in_turns((graph, self._graph))
        return {"ms": ms, "unchanged_ms": unchanged, "distance": off}


def warm(number: int) -> None:
    """Compile what change `number` of the plan needs; in a process of its own."""
    change = plan()[number]
    with changed([change]):
        compile_kernels(change.work)


def compile_all(changes: Sequence[Change], processes: int, until: float) -> dict[str, str]:
    """`warm` for all changes, so many at a time; Triton keeps what they compile. What the failed ones said, by key."""
    everything, code = plan(), "from benchmarks.tune import warm; warm"
    return side_by_side({key_of([c]): f"{code}({everything.index(c)})" for c in changes}, processes, until)


def key_of(changes: Sequence[Change]) -> str:
    return f"{changes[0].work}: {'; '.join(map(str, changes))}"


Results = dict[str, dict[str, Any]]


def try_all(
    changes: Sequence[Change], make_bench: Callable[[str], Callable[[Sequence[Change]], dict[str, float]]],
    results: Results, save: Callable[[], None], until: float,
) -> None:  # fmt: skip
    """Fill `results` with what is not there yet, work by work, and save after each; stop when time is up.

    A change that was being tried when the last run ended is taken to have ended it.
    """
    for work in dict.fromkeys(c.work for c in changes):
        own = [[c] for c in changes if c.work == work]
        bench = None
        for step in [*own, None]:
            trial = best_together(own, results) if step is None else step
            key = key_of(trial) if trial else ""
            if not trial or results.get(key, {"running": True}) != {"running": True}:
                continue
            if time.monotonic() > until:
                return
            if key in results:
                results[key] = {"error": "ended the process that tried it"}
            else:
                results[key] = {"running": True}
                save()
                bench = bench or make_bench(work)
                results[key] = _tried(bench, trial)
            save()
            print(f"{key}: {shown(results[key])}", flush=True)
            if "error" in results[key]:
                _check_device()


def _check_device() -> None:
    """Leave if nothing can run any more: a kernel that went out of its memory spoils the process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"tune: the last change broke the device's context ({error}). Run again to go on.") from error


def _tried(bench: Callable[[Sequence[Change]], dict[str, float]], trial: Sequence[Change]) -> dict[str, Any]:
    try:
        return bench(trial)
    except Exception as error:  # whatever a change breaks, the others are still to be tried
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def best_together(trials: Sequence[Sequence[Change]], results: Results) -> list[Change]:
    """The best change of each entry, if several entries are worth one."""
    best: dict[tuple, tuple[float, Change]] = {}
    for (change,) in trials:
        found = gain(results.get(key_of([change]), {}))
        if found >= max(WORTH, best.get(change.path, (0.0, change))[0]):
            best[change.path] = (found, change)
    return [change for _, change in best.values()] if len(best) > 1 else []


def gain(result: dict[str, Any]) -> float:
    """How many times as fast as the unchanged tables; 0 for what failed."""
    return result["unchanged_ms"] / result["ms"] if "ms" in result else 0.0


def shown(result: dict[str, Any]) -> str:
    if "ms" not in result:
        return result.get("error", "not done")
    return f"{result['ms']:.3f} ms, {100 * (gain(result) - 1):+.1f} %"


def rows(results: Results) -> list[list[str]]:
    """Of the table, by gain."""
    found = []
    for key, result in sorted(results.items(), key=lambda item: -gain(item[1])):
        work, change = key.split(": ", 1)
        if "ms" in result:
            numbers = [f"{result['ms']:.3f}", f"{result['unchanged_ms']:.3f}", f"{100 * (gain(result) - 1):+.1f} %"]
            found.append([work, change, *numbers, f"{result['distance']:.0e}"])
        else:
            found.append([work, change, "–", "–", "–", shown(result)])
    return found


def load(path: Path | None, here: dict[str, Any]) -> Results:
    """What an earlier run on this machine and commit found."""
    if path is None or not path.is_file():
        return {}
    kept = texts.loads(path.read_text())
    if kept["machine"] != here:
        raise ValueError(
            f"tune: {path} holds results of {kept['machine']}, this is {here}. Give --json another file, or remove it."
        )
    return kept["results"]


def main(
    only: str = "", json: Path | None = None, seconds_in_all: float = 540.0, processes: int = os.cpu_count() or 1,
    show: bool = False,
) -> None:  # fmt: skip
    """Try other launch options, and say which are faster.

    Args:
        only: Only changes whose work or text contains this, as mlp_backward.
        json: Keep the results here after each change; a later run goes on from them.
        seconds_in_all: Begin no further change after so long.
        processes: Compile so many changes at a time.
        show: Only print what would be tried.
    """
    changes = plan(only)
    if show:
        print("\n".join(f"{key_of([c])} (now {present(c.path)})" for c in changes))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune: launch options are timed on a GPU, there is none. --show prints what would be tried.")
    until, here = time.monotonic() + seconds_in_all, machine("cuda")
    results = load(json, here)

    def save() -> None:
        write_json(json, {"machine": here, "results": results})

    left = [c for c in changes if key_of([c]) not in results]
    # First what all have in common, or each would compile it.
    if failed := compile_ahead(dict.fromkeys(c.work for c in left), processes, until):
        raise SystemExit(f"tune: the unchanged tables: {failed}")
    results |= {key: {"error": words} for key, words in compile_all(left, processes, until).items()}
    save()
    try_all(changes, Bench, results, save, until)
    print_table(f"{here['device']}, torch {here['torch']}, triton {here['triton']}", COLUMNS, rows(results))
    missing = sum(key_of([c]) not in results for c in changes)
    if missing:
        print(f"{missing} changes are left; run again with the same --json to go on.")


if __name__ == "__main__":
    tyro.cli(main)
