"""Training on sequences that are cut over processes: tokens per second and peak memory, for 1, 2, … of them.

Whole steps (reading, forward, backward, clipping, AdamW) on random bytes, the same tokens for any number of processes.
Started plainly, it starts torchrun for every number in turn on this machine; started by torchrun, it measures those
processes alone. Memory: on a GPU what PyTorch has allocated, else the resident set; of the process with the most.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.timing import machine, print_table, write_json
from benchmarks.train import random_store
from fastweight.devices import pick_device
from fastweight.distributed.mesh import MeshConfig
from fastweight.distributed.team import Team, joined, local_device
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig
from fastweight.train.loop import Trainer
from fastweight.train.metrics import NoMetrics
from fastweight.train.prepare import prepared
from fastweight.train.report import Report
from fastweight.train.source import step_batches
from fastweight.train.start import new_start, placed
from fastweight.train.tally import Tally

COLUMNS = ["processes", "median ms/step", "min–max", "tokens/s", "speed-up", "peak GiB of a process"]
PART = "FASTWEIGHT_BENCHMARK_PART"  # set for processes that this program has started: the file for their numbers


@dataclass(frozen=True, kw_only=True)
class Options:
    """processes: numbers to try (not under torchrun). seq_len, batch_size: tokens of a step. turns: as in the mesh."""

    preset: str = "tiny-lact"
    processes: tuple[int, ...] = (1, 2)
    seq_len: int = 4096
    batch_size: int = 1
    turns: int = 1
    device: str = "cpu"
    precision: str = "float32"
    activation_checkpointing: bool = False
    steps: int = 5
    json: Path | None = None


def settings(options: Options, processes: int) -> TrainConfig:
    turns = options.turns if processes > 2 else 1
    return TrainConfig(
        model=ModelSource(preset=options.preset),
        data=DataConfig(seq_len=options.seq_len, batch_size=options.batch_size),
        log=LogConfig(every=10**9),
        mesh=MeshConfig(context=processes, turns=turns),
        precision=options.precision,  # type: ignore[arg-type]  # checked by the config
        activation_checkpointing=options.activation_checkpointing,
        steps=10**9,
        device=options.device,
    )


def time_steps(options: Options, team: Team, folder: Path) -> dict[str, Any]:
    """Milliseconds of each step after one for warming up, and the peak memory."""
    config = settings(options, team.size)
    device = local_device(pick_device(config.device))
    team.arrange(config.mesh, device)
    store = random_store(folder / "store", 2 * options.seq_len * options.batch_size)
    torch.manual_seed(0)
    model = placed(new_start(config, store, None, team), team, device)
    trainer = Trainer(config, folder, model, store, Tally(), Report(config, quiet=True), NoMetrics(), team)
    steps, times = step_batches(store.split("train"), config.data, 0, 0, team.reader, team.readers), []
    with prepared(model, config):
        for _ in range(1 + options.steps):
            batches = next(steps)
            team.wait()
            began = time.perf_counter()
            trainer.step(batches)  # its gradient norm waits for the device
            team.wait()
            times.append(1e3 * (time.perf_counter() - began))
    return {"processes": team.size, "turns": config.mesh.turns, "ms": times[1:], "peak_gib": peak(team, device)}


def peak(team: Team, device: torch.device) -> float:
    """GiB of the process with the most."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    return max(team.sum([own if rank == team.rank else 0 for rank in range(team.size)])) / 2**30


def measured(options: Options) -> dict[str, Any] | None:
    """The numbers of the processes that torchrun has started, for the first of them; None for the others."""
    with joined(600) as team, tempfile.TemporaryDirectory() as folder:
        result = time_steps(options, team, Path(folder))
        return result if team.leads else None


def launched(processes: int) -> dict[str, Any]:
    """The numbers of so many processes, started here with the options of this one."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "benchmarks.context"]
        environment = os.environ | {PART: str(part)}
        subprocess.run([sys.executable, *start, *sys.argv[1:]], check=True, env=environment, stdout=sys.stderr)
        return json.loads(part.read_text())


def row(record: dict[str, Any], first: dict[str, Any], tokens: int) -> list[str]:
    """One line of the table; first: what speed-ups are counted from."""
    times, median = record["ms"], statistics.median(record["ms"])
    spread, rate = f"{min(times):.0f}–{max(times):.0f}", f"{1e3 * tokens / median:,.0f}"
    speed_up, peak_gib = f"{statistics.median(first['ms']) / median:.2f}", f"{record['peak_gib']:.2f}"
    return [str(record["processes"]), f"{median:.0f}", spread, rate, speed_up, peak_gib]


def main(options: Options) -> None:
    if "WORLD_SIZE" in os.environ:
        record = measured(options)
        if record is None:
            return
        if PART in os.environ:
            Path(os.environ[PART]).write_text(json.dumps(record))
            return
        records = [record]
    else:
        records = [launched(processes) for processes in options.processes]
    where, tokens = machine(options.device), options.seq_len * options.batch_size
    title = f"{options.preset}, {options.batch_size} × {options.seq_len} tokens per step, {options.precision}, {where}"
    print_table(title, COLUMNS, [row(record, records[0], tokens) for record in records])
    shape = {"preset": options.preset, "seq_len": options.seq_len, "batch_size": options.batch_size}
    kept = {"precision": options.precision, "activation_checkpointing": options.activation_checkpointing}
    write_json(options.json, {"machine": where, **shape, **kept, "runs": records})


if __name__ == "__main__":
    main(tyro.cli(Options))
