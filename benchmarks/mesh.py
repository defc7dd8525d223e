"""Training by several processes: tokens per second, peak memory, and seconds to save and to restore a checkpoint.

Whole steps (reading, forward, backward, clipping, AdamW) on random bytes. kind context: sequences are cut, the same
tokens for any number of processes; shard, replicate: weights are cut or copied, each process reads batch_size sequences
of its own. Started plainly, it starts torchrun for every number in turn on this machine; started by torchrun, it
measures those processes alone. Memory: on a GPU what PyTorch has allocated, else the resident set; of the process with
the most.
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
from typing import Any, Literal

import torch
import tyro

from benchmarks.profile import lines, profiled
from benchmarks.timing import machine, print_table, write_json
from benchmarks.train import random_store
from fastweight.data import Store
from fastweight.devices import pick_device
from fastweight.distributed.mesh import Gather, MeshConfig
from fastweight.distributed.team import Team, joined, local_device
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig, checkpoint
from fastweight.train.config import Precision
from fastweight.train.loop import Trainer
from fastweight.train.metrics import NoMetrics
from fastweight.train.prepare import prepared
from fastweight.train.report import Report
from fastweight.train.source import step_batches
from fastweight.train.start import Start, new_start, placed, resumed_start
from fastweight.train.tally import Tally

COLUMNS = [
    "processes", "median ms/step", "min–max", "tokens/s", "speed-up", "peak GiB of a process",
    "save s (training waits, all)", "restore s",
]  # fmt: skip
# Set for processes that this program has started: the file for their numbers, and a folder for all of them.
PART, FOLDER = "FASTWEIGHT_BENCHMARK_PART", "FASTWEIGHT_BENCHMARK_FOLDER"


@dataclass(frozen=True, kw_only=True)
class Options:
    """processes: numbers to try (not under torchrun). seq_len, batch_size: tokens of a step, of each process unless
    sequences are cut. turns, gather: as in the mesh. checkpoint: also save and restore. profile: also say where the
    time of a step goes, kernel by kernel; on a GPU."""

    kind: Literal["context", "shard", "replicate"] = "context"
    preset: str = "tiny-lact"
    processes: tuple[int, ...] = (1, 2)
    seq_len: int = 4096
    batch_size: int = 1
    turns: int = 1
    gather: Gather = "own"
    device: str = "cpu"
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    feed_forward_checkpointing: bool = False
    compile: bool = False
    checkpoint: bool = False
    profile: bool = False
    steps: int = 5
    json: Path | None = None


def settings(options: Options, processes: int) -> TrainConfig:
    cut = options.kind == "context"
    turns = options.turns if cut and processes > 2 else 1
    return TrainConfig(
        model=ModelSource(preset=options.preset),
        data=DataConfig(seq_len=options.seq_len, batch_size=options.batch_size * (1 if cut else processes)),
        log=LogConfig(every=10**9),
        mesh=MeshConfig(
            turns=turns,
            context=processes if cut else 1,
            replicate=processes if options.kind == "replicate" else 1,
            gather=options.gather,
        ),
        precision=options.precision,
        activation_checkpointing=options.activation_checkpointing,
        feed_forward_checkpointing=options.feed_forward_checkpointing,
        compile=options.compile,
        steps=10**9,
        device=options.device,
    )


def trainer_of(config: TrainConfig, start: Start, store: Store, team: Team, folder: Path) -> Trainer:
    model = placed(start, team, local_device(pick_device(config.device)))
    return Trainer(config, folder, model, store, Tally(), Report(config, quiet=True), NoMetrics(), team)


def measured_here(options: Options, team: Team, folder: Path) -> dict[str, Any]:
    """Milliseconds of each step after two for warming up, the peak memory, and seconds of a checkpoint."""
    config = settings(options, team.size)
    device = local_device(pick_device(config.device))
    team.arrange(config.mesh, device)
    store = random_store(folder / f"store-{team.rank}", 2 * options.seq_len * config.data.batch_size)
    torch.manual_seed(0)
    trainer = trainer_of(config, new_start(config, store, None, team), store, team, folder)
    about = {"processes": team.size, "turns": config.mesh.turns, "sequences": config.data.batch_size}
    found = about | time_steps(trainer, config, options) | {"peak_gib": peak(team, device)}
    return found | (checkpoint_seconds(trainer, store) if options.checkpoint else {})


def time_steps(trainer: Trainer, config: TrainConfig, options: Options) -> dict[str, Any]:
    """ms: of each step after two for warming up; profile: of one more, if it is asked for."""
    team, times = trainer.team, []
    batches = step_batches(trainer.store.split("train"), config.data, 0, 0, team.reader, team.readers)
    with prepared(trainer.model, config):
        for _ in range(2 + options.steps):
            step = next(batches)
            team.wait()
            began = time.perf_counter()
            trainer.step(step)  # its gradient norm waits for the device
            team.wait()
            times.append(1e3 * (time.perf_counter() - began))
        seen = profiled(lambda: trainer.step(next(batches))) if options.profile else None
    return {"ms": times[2:]} | ({} if seen is None else {"profile": seen})


def checkpoint_seconds(trainer: Trainer, store: Store) -> dict[str, float]:
    """Seconds in which training waits for a checkpoint, until it counts, and until a new trainer has read it."""
    team, config, folder = trainer.team, trainer.config, trainer.out
    began = time.perf_counter()
    trainer.save()
    waited = time.perf_counter() - began
    trainer.writer.finish()
    saved = time.perf_counter() - began
    team.wait()
    began = time.perf_counter()
    start = resumed_start(config, folder, {}, True, team)
    assert start.checkpoint is not None
    again = trainer_of(config, start, store, team, folder)
    again.restore(checkpoint.read_trainer(start.checkpoint, again.device))
    team.wait()
    return {"save_waited_s": waited, "save_s": saved, "restore_s": time.perf_counter() - began}


def peak(team: Team, device: torch.device) -> float:
    """GiB of the process with the most."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device)
    return max(team.sum([own if rank == team.rank else 0 for rank in range(team.size)])) / 2**30


def measured(options: Options) -> dict[str, Any] | None:
    """The numbers of the processes that torchrun has started, for the first of them; None for the others."""
    shared = os.environ.get(FOLDER)
    with joined(600) as team, tempfile.TemporaryDirectory() as own:
        result = measured_here(options, team, Path(shared or own))
        return result if team.leads else None


def launched(processes: int) -> dict[str, Any]:
    """The numbers of so many processes, started here with the options of this one."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "benchmarks.mesh"]
        environment = os.environ | {PART: str(part), FOLDER: folder}
        subprocess.run([sys.executable, *start, *sys.argv[1:]], check=True, env=environment, stdout=sys.stderr)
        return json.loads(part.read_text())


def row(record: dict[str, Any], first: dict[str, Any], seq_len: int) -> list[str]:
    """One line of the table; first: what speed-ups are counted from."""
    median, rate = statistics.median(record["ms"]), tokens_per_second(record, seq_len)
    spread, speed_up = f"{min(record['ms']):.0f}–{max(record['ms']):.0f}", rate / tokens_per_second(first, seq_len)
    saved, restored = "–", "–"
    if "save_s" in record:
        saved, restored = f"{record['save_waited_s']:.2f}, {record['save_s']:.2f}", f"{record['restore_s']:.2f}"
    gib = f"{record['peak_gib']:.2f}"
    return [
        str(record["processes"]), f"{median:.0f}", spread, f"{rate:,.0f}", f"{speed_up:.2f}", gib, saved, restored,
    ]  # fmt: skip


def tokens_per_second(record: dict[str, Any], seq_len: int) -> float:
    return 1e3 * seq_len * record["sequences"] / statistics.median(record["ms"])


def main(options: Options) -> None:
    if "WORLD_SIZE" in os.environ:
        if options.checkpoint and FOLDER not in os.environ:
            raise SystemExit("--checkpoint needs a folder that all processes see: start this without torchrun.")
        record = measured(options)
        if record is None:
            return
        if PART in os.environ:
            Path(os.environ[PART]).write_text(json.dumps(record))
            return
        records = [record]
    else:
        records = [launched(processes) for processes in options.processes]
    for record in records:
        if "profile" in record:
            print("\n".join([f"{record['processes']} processes", *lines(record["profile"])]))
    where = machine(options.device)
    title = f"{options.preset}, {options.kind}, sequences of {options.seq_len} tokens, {options.precision}, {where}"
    print_table(title, COLUMNS, [row(record, records[0], options.seq_len) for record in records])
    asked = {name: value for name, value in vars(options).items() if name not in ("json", "processes")}
    write_json(options.json, {"machine": where, **asked, "runs": records})


if __name__ == "__main__":
    main(tyro.cli(Options))
