"""Muon: the time of a step beside torch's own, and what its variants and averaged weights are worth in a tiny run.

The first table steps the matrices of a deep decoder with random gradients, all optimisers in turn in one process. The
second trains the same tiny model from the same seeds on the Python standard library, each variant for the same steps,
and compares held-out bits per byte seed by seed with plain Muon. A run of minutes says which way a variant points there
and not what it is worth at scale.
"""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.timing import machine, measure, print_table, write_json
from fastweight.data import prepare
from fastweight.optim import AveragingConfig, Muon, OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig, train

ALL = {"rows": "equalised", "coefficients": "polar-express", "normuon": True, "cautious": True}
STEPPERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "torch.optim.Muon, bfloat16": lambda p: torch.optim.Muon(p, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
    "ours, bfloat16": lambda p: Muon(p, lr=1e-3, dtype="bfloat16"),
    "ours, float32": lambda p: Muon(p, lr=1e-3, dtype="float32"),
    "ours, auto, all variants": lambda p: Muon(p, lr=1e-3, **ALL),
}
PLAIN = "muon"
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    PLAIN: {},
    "polar-express": {"muon_coefficients": "polar-express"},
    "MuonEq-R": {"muon_rows": "equalised"},
    "NorMuon": {"normuon": True},
    "cautious decay": {"muon_cautious": True},
    "momentum 0.85 → 0.95": {"muon_momentum_steps": 60},
    "polar-express, MuonEq-R, NorMuon, cautious": {
        "muon_coefficients": "polar-express",
        "muon_rows": "equalised",
        "normuon": True,
        "muon_cautious": True,
    },
}
AVERAGES = {
    "ema 0.97": AveragingConfig(kind="ema", decay=0.97),
    "ema 0.9": AveragingConfig(kind="ema", decay=0.9),
    "swa every 5 below 0.4": AveragingConfig(kind="swa", every=5, start_factor=0.4),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """layers, width: of the decoder that is stepped. preset, steps, seeds: of the tiny runs; steps 0: none."""

    layers: int = 30
    width: int = 192
    preset: str = "tiny-attention"
    steps: int = 120
    seeds: int = 3
    device: str = "cpu"
    threads: int = 1
    rounds: int = 5
    json: Path | None = None


def decoder_matrices(options: Options) -> list[torch.nn.Parameter]:
    """Projections of attention and of a gated feed-forward per layer, with random gradients."""
    d, hidden = options.width, options.width * 8 // 3
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * d, d), (d, d), (hidden, d), (hidden, d), (d, hidden)] * options.layers
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator).to(options.device)) for s in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(options.device)
    return parameters


def time_steps(options: Options) -> list[dict[str, Any]]:
    """Milliseconds of a step, in rounds through all optimisers, so that a busy machine slows all alike."""
    optimizers = {name: make(decoder_matrices(options)) for name, make in STEPPERS.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(options.rounds):
        for name, optimizer in optimizers.items():
            times[name].append(measure(optimizer.step, options.device, seconds=0.0, at_least=3)["median_ms"])
    return [
        {"optimizer": name, "median_ms": statistics.median(t), "low_ms": min(t), "high_ms": max(t)}
        for name, t in times.items()
    ]


def run_config(options: Options, store: Path, seed: int, variant: dict[str, Any]) -> TrainConfig:
    """Plain Muon unless `variant` says otherwise; constant, then linear to a tenth over the last 80 %."""
    optimizer = OptimizerConfig(name="muon", lr=4e-3, muon_lr=2e-2, weight_decay=0.1)
    return TrainConfig(
        model=ModelSource(preset=options.preset),
        data=DataConfig(store=str(store), seq_len=128, batch_size=4),
        optimizer=dataclasses.replace(optimizer, **variant),
        schedule=ScheduleConfig(kind="linear", decay_fraction=0.8, final_ratio=0.1, warmup_steps=5),
        averaging=AVERAGES["ema 0.97"],
        log=LogConfig(every=10**6, checkpoint_every=0, heldout_tokens=32768),
        steps=options.steps,
        seed=seed,
        device=options.device,
    )


def train_variants(options: Options) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Held-out bits per byte by seed: of the last weights of every variant, and of plain Muon's averages."""
    raw: dict[str, list[float]] = {name: [] for name in VARIANTS}
    averaged: dict[str, list[float]] = {name: [] for name in AVERAGES}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        prepare("python-stdlib", "bytes", store)
        for seed in range(options.seeds):
            for i, (name, variant) in enumerate(VARIANTS.items()):
                result = _train(run_config(options, store, seed, variant), Path(folder) / f"{seed}-{i}")
                raw[name].append(result["raw"])
            for i, (name, average) in enumerate(AVERAGES.items()):
                config = dataclasses.replace(run_config(options, store, seed, {}), averaging=average)
                averaged[name].append(_train(config, Path(folder) / f"{seed}-average-{i}")["averaged"])
    return raw, averaged


def _train(config: TrainConfig, out: Path) -> dict[str, float]:
    result = train(config, out, quiet=True)
    assert result.raw is not None
    assert result.after is not None
    return {"raw": result.raw["bits_per_byte"], "averaged": result.after["bits_per_byte"]}


def compared(name: str, values: list[float], base: list[float]) -> list[str]:
    """A row: mean, and mean and standard deviation of the differences from plain Muon, seed by seed."""
    differences = [value - other for value, other in zip(values, base, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else float("nan")
    return [name, f"{statistics.mean(values):.4f}", f"{statistics.mean(differences):+.4f} ± {spread:.4f}"]


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    where, steps = machine(options.device), time_steps(options)
    rows = [
        [step["optimizer"], f"{step['median_ms']:.1f}", f"{step['low_ms']:.1f}–{step['high_ms']:.1f}"] for step in steps
    ]
    title = f"One step of {5 * options.layers} matrices, {options.layers} layers of width {options.width}, {where}"
    print_table(title, ["optimizer", "median ms", "lowest–highest"], rows)
    record: dict[str, Any] = {"machine": where, "layers": options.layers, "width": options.width, "step_times": steps}
    if options.steps:
        raw, averaged = train_variants(options)
        table = [compared(name, values, raw[PLAIN]) for name, values in (raw | averaged).items()]
        title = f"{options.preset}, {options.steps} steps of 4 × 128 bytes, {options.seeds} seeds, held-out"
        print_table(title, ["variant", "bits/byte", f"difference from {PLAIN}"], table)
        record |= {"preset": options.preset, "steps": options.steps, "raw_bits": raw, "averaged_bits": averaged}
    write_json(options.json, record)


if __name__ == "__main__":
    main(tyro.cli(Options))
