"""Training tokens per second, whole steps: reading, forward, backward, clipping, optimiser; no logging, no saving.

Every tiny preset with AdamW, and the first one also with Muon, on random bytes: the speed does not depend on the text.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.profile import lines, profiled
from benchmarks.timing import machine, measure, print_table, write_json
from fastweight.data import ByteTokenizer, Store, StoreWriter
from fastweight.effort import forward_flops
from fastweight.model import Model
from fastweight.optim import OptimizerConfig
from fastweight.optim.groups import OptimizerName
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig
from fastweight.train.config import Precision
from fastweight.train.loop import Trainer
from fastweight.train.metrics import Metrics
from fastweight.train.prepare import prepared
from fastweight.train.report import Report
from fastweight.train.source import step_batches
from fastweight.train.tally import Tally

# TFLOP/s: of the layers' matrices alone (see fastweight.effort.forward_flops), not of memories and attention.
COLUMNS = ["preset", "optimizer", "median ms/step", "quartiles", "tokens/s", "TFLOP/s", "peak GiB"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """presets: which models. seq_len, batch_size: tokens of one step. profile: of one more step, on a GPU."""

    presets: tuple[str, ...] = ("tiny-delta", "tiny-gated-delta", "tiny-hybrid", "tiny-attention", "tiny-ttt-linear")
    seq_len: int = 512
    batch_size: int = 8
    device: str = "cpu"
    precision: Precision = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    feed_forward_checkpointing: bool = False
    profile: bool = False
    seconds: float = 5.0
    json: Path | None = None


def random_store(folder: Path, num_tokens: int) -> Store:
    """One document of random bytes."""
    writer = StoreWriter(folder, ByteTokenizer())
    ids = np.random.default_rng(0).integers(0, 256, num_tokens)
    writer.add("train", ids, np.ones_like(ids))
    writer.finish(source="random bytes")
    return Store.open(folder)


@contextmanager
def trained(preset: str, optimizer: OptimizerName, options: Options) -> Iterator[tuple[Model, Callable[[], object]]]:
    """A model and a function that trains it for one step."""
    config = TrainConfig(
        model=ModelSource(preset=preset),
        data=DataConfig(seq_len=options.seq_len, batch_size=options.batch_size),
        optimizer=OptimizerConfig(name=optimizer),
        log=LogConfig(every=10**9),
        precision=options.precision,
        compile=options.compile,
        activation_checkpointing=options.activation_checkpointing,
        feed_forward_checkpointing=options.feed_forward_checkpointing,
        steps=10**9,
    )
    torch.manual_seed(0)
    model = Model.from_preset(preset).to(options.device)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        store = random_store(folder / "store", 64 * options.seq_len * options.batch_size)
        metrics = Metrics(folder, config.log, 0, {})
        trainer = Trainer(config, folder, model, store, Tally(), Report(config, quiet=True), metrics)
        steps = step_batches(store.split("train"), config.data, seed=0, start_step=0)
        with prepared(model, config):
            yield model, lambda: trainer.step(next(steps))
        metrics.close()


def time_steps(preset: str, optimizer: OptimizerName, options: Options) -> dict[str, Any]:
    """Milliseconds of one step, median and quartiles; what the model is; what it reaches."""
    with trained(preset, optimizer, options) as (model, step):
        result: dict[str, Any] = measure(step, options.device, seconds=options.seconds)
    tokens = options.seq_len * options.batch_size
    operations = 3 * forward_flops(model) * tokens
    return result | {
        "parameters": model.num_parameters, "tflops": operations / result["median_ms"] / 1e9,
        "tokens_per_second": 1e3 * tokens / result["median_ms"],
    }  # fmt: skip


def profile_steps(preset: str, optimizer: OptimizerName, options: Options) -> dict[str, Any]:
    """Where the time of a step goes, on a GPU. Time before: see `profiled`."""
    with trained(preset, optimizer, options) as (_model, step):
        for _ in range(2):
            step()
        found = profiled(step)
    print("\n".join([f"{preset}, {optimizer}:", *lines(found)]), flush=True)
    return found


def row(r: dict[str, Any]) -> list[str]:
    """One line of the table."""
    spread = f"{r['low_ms']:.0f}–{r['high_ms']:.0f}"
    memory = f"{r['peak_gib']:.1f}" if "peak_gib" in r else "–"
    rate = f"{r['tflops']:.3g}" if "tflops" in r else "–"
    return [
        r["preset"], r["optimizer"], f"{r['median_ms']:.0f}", spread, f"{r['tokens_per_second']:,.0f}", rate, memory,
    ]  # fmt: skip


def main(options: Options) -> None:
    runs: list[tuple[str, OptimizerName]] = [(preset, "adamw") for preset in options.presets]
    runs.append((options.presets[0], "muon"))
    records = [{"preset": p, "optimizer": o, **time_steps(p, o, options)} for p, o in runs]
    for record in records if options.profile else ():
        record["profile"] = profile_steps(record["preset"], record["optimizer"], options)
    where = machine(options.device)
    title = f"Training, {options.batch_size} × {options.seq_len} tokens per step, {options.precision}, {where}"
    print_table(title, COLUMNS, [row(r) for r in records])
    shape = {"seq_len": options.seq_len, "batch_size": options.batch_size, "precision": options.precision}
    write_json(options.json, {"machine": where, **shape, "runs": records})


if __name__ == "__main__":
    main(tyro.cli(Options))
