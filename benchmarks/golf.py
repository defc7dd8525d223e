"""What the contest's choices are worth: optimisers, loops and averages; GPTQ against rounding; learners at evaluation.

variants: a model of the record's shape is trained for a fixed number of steps, each variant from the same seeds, and
held-out bits per byte are compared seed by seed with the first one. rounding: the trained model is packed at equal
bytes with GPTQ and with rounding to nearest, and what was read back is scored. learners: each learner reads held-out
documents at a few rates with one model, then other documents at its best rate with the models of all seeds, cached and
exact.

Everything is kept in `out`; called again, it goes on. A run of minutes says which way a variant points there and not
what it is worth at scale.
"""

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.golf_learners import compare_learners
from benchmarks.golf_options import BASE, HEAD_DIM, LR, PARTS, VARIANTS, Options, Variant, narrow, spread
from benchmarks.timing import machine, print_table, write_json
from fastweight.artifact import Hessians, PackSpec, collect_hessians, fit_to_size, unpack
from fastweight.data import Store, Windows, loader
from fastweight.devices import pick_device
from fastweight.evaluate import score
from fastweight.golf_presets import record
from fastweight.model import Model, load
from fastweight.optim import AveragingConfig, OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, TrainConfig, train


def model_of(options: Options, vocab_size: int, loops: int, seed: int) -> Model:
    """The record's shape at `options.width`; equal seeds give equal weights, whatever the loops."""
    config = record(
        d_model=options.width, heads=options.width // HEAD_DIM, loops=(3, 6, loops), vocab_size=vocab_size,
        window=options.seq_len,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Model(config)


def run_config(options: Options, variant: Variant, seed: int) -> TrainConfig:
    """The record's recipe by steps instead of seconds."""
    optimizer = OptimizerConfig(
        name="muon", lr=LR, muon_lr=0.022, muon_scale="original", weight_decay=0.095, muon_rows="equalised",
        muon_coefficients="polar-express", muon_momentum=0.97, muon_momentum_first=0.92,
        muon_momentum_steps=options.steps // 4, lr_factors={"embedding.weight": 1.5},
    )  # fmt: skip
    config = TrainConfig(
        data=DataConfig(store=str(options.store), seq_len=options.seq_len, batch_size=options.batch_size),
        optimizer=dataclasses.replace(optimizer, **variant.optimizer),
        schedule=ScheduleConfig(
            kind="linear",
            decay_fraction=0.75,
            final_ratio=0.1,
            weight_decay_final_ratio=0.5,
            warmup_steps=round(variant.warmup * options.steps),
        ),
        averaging=AveragingConfig(kind="ema", decay=0.98),
        log=LogConfig(every=50, checkpoint_every=0, keep_checkpoints=1, heldout_tokens=options.heldout_tokens),
        steps=options.steps,
        clip_norm=0.3,
        seed=seed,
        precision="bfloat16" if pick_device(options.device).type == "cuda" else "float32",
        compile=options.compile,
        device=options.device,
    )
    return dataclasses.replace(config, **variant.run)


def folder_of(options: Options, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return options.out / "runs" / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"


def train_one(options: Options, task: tuple[str, int]) -> dict[str, Any]:
    """One run, or what an earlier call found. Held-out bits per byte of the last weights and of the averaged ones."""
    if options.threads:
        torch.set_num_threads(options.threads)
    name, seed = task
    variant, out = VARIANTS[name], folder_of(options, name, seed)
    config, found = run_config(options, variant, seed), out / "found.json"
    asked = {"config": config.to_dict(), "width": options.width, "loops": variant.loops}
    asked = json.loads(json.dumps(asked))
    if found.is_file():
        held = json.loads(found.read_text())
        if held["asked"] == asked:
            return held
        raise SystemExit(f"{out} holds a run with other settings. Use another --out.")
    model = model_of(options, Store.open(options.store).tokenizer.vocab_size, variant.loops, seed)
    begun = (out / "latest").is_file()
    result = train(config, out, resume=begun, model=None if begun else model, quiet=True)
    if result.raw is None or result.after is None:
        raise SystemExit(f"{name}, seed {seed}: ended early ({result.stopped}). Called again, it goes on.")
    values = {
        "asked": asked, "variant": name, "seed": seed, "raw": result.raw["bits_per_byte"],
        "averaged": result.after["bits_per_byte"], "seconds": result.seconds, "steps": result.step,
        "tokens_per_second": result.tokens_per_second, "parameters": result.parameters, "bad_steps": result.bad_steps,
    }  # fmt: skip
    write_json(found, values)
    print(f"{name}, seed {seed}: {values['averaged']:.4f} bits/byte in {result.seconds:.0f} s", flush=True)
    return values


def train_all(options: Options, tasks: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """All runs, `jobs` at a time; a process goes on with what it has compiled."""
    if options.jobs == 1:
        return [train_one(options, task) for task in tasks]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(train_one, options), tasks))


def compare_variants(options: Options) -> dict[str, Any]:
    """Every variant with every seed; a table with the differences from the first one, seed by seed."""
    names = tuple(dict.fromkeys((BASE, *options.variants)))
    runs = train_all(options, [(name, seed) for seed in range(options.seeds) for name in names])
    rows = []
    for name in names:
        ours, base = ([r for r in runs if r["variant"] == n] for n in (name, BASE))
        apart = [a["averaged"] - b["averaged"] for a, b in zip(ours, base, strict=True)]
        gain = statistics.mean(r["averaged"] - r["raw"] for r in ours)
        speed = statistics.median(r["tokens_per_second"] for r in ours)
        rows.append(
            [name, spread([r["averaged"] for r in ours]), spread(apart, "+.4f"), f"{gain:+.4f}", f"{speed:,.0f}"]
        )
    columns = ["variant", "bits/byte", f"difference from {BASE}", "averaged − raw", "tokens/s"]
    print_table(f"{options.steps} steps, {options.seeds} seeds, width {options.width}", columns, rows)
    return {"runs": [{k: v for k, v in r.items() if k != "asked"} for r in runs]}


def base_models(options: Options, count: int) -> list[Path]:
    """Folders of the models that are given, else of the base's averaged ones, trained if they are not there."""
    if options.models:
        return list(options.models[:count])
    train_all(options, [(BASE, seed) for seed in range(count)])
    return [folder_of(options, BASE, seed) / "model" for seed in range(count)]


def windows_score(options: Options, model: Model) -> dict[str, Any]:
    """Bits per byte of the held-out split in windows side by side."""
    with narrow(options):
        found = score(
            model, Store.open(options.store).split("heldout"), context="windows", seq_len=options.seq_len,
            stride=options.seq_len, batch_size=options.batch_size, max_tokens=options.heldout_tokens,
        )  # fmt: skip
    return {"bits_per_byte": found.bits_per_byte, "seconds": found.seconds}


def hessians_of(options: Options, model: Model) -> Hessians:
    """Second moments over training text."""
    view = Windows(Store.open(options.store).split("train"), options.seq_len)
    rows = min(options.batch_size, len(view))
    count = max(1, options.calibration_tokens // (rows * options.seq_len))
    batches = loader(view, rows, seed=1)
    return collect_hessians(model, [next(batches) for _ in range(count)])


def compare_rounding(options: Options) -> dict[str, Any]:
    """GPTQ and rounding to nearest at equal bytes, each scored from what is read back."""
    device = pick_device(options.device)
    model = load(base_models(options, 1)[0], device).eval()
    started = time.perf_counter()
    hessians = hessians_of(options, model)
    calibration = time.perf_counter() - started
    whole, found = windows_score(options, model), []
    for bits in options.bits_per_weight:
        cap = round(model.num_parameters * bits / 8)
        for method in ("gptq", "nearest"):
            started = time.perf_counter()
            fitted = fit_to_size(model, cap, PackSpec(method=method), hessians=hessians if method == "gptq" else None)
            seconds = time.perf_counter() - started
            scored = windows_score(options, unpack(fitted.data).to(device).eval())
            found.append({
                "bits_per_weight": bits, "method": method, "cap_bytes": cap, "bytes": len(fitted.data),
                "tries": len(fitted.tried), "pack_seconds": seconds, **scored,
            })  # fmt: skip
    rows = [
        [r["bits_per_weight"], r["method"], f"{r['bytes']:,}", f"{r['bits_per_byte']:.4f}",
         f"{r['bits_per_byte'] - whole['bits_per_byte']:+.4f}", f"{r['pack_seconds']:.1f} ({r['tries']})"]
        for r in found
    ]  # fmt: skip
    columns = ["bits/weight", "method", "bytes", "bits/byte", "loss by rounding", "packing, s (tries)"]
    title = f"{model.num_parameters:,} weights, {whole['bits_per_byte']:.4f} bits/byte, Hessians in {calibration:.1f} s"
    print_table(title, columns, rows)
    return {"whole": whole, "hessian_seconds": calibration, "packed": found}


def compare_all_learners(options: Options) -> dict[str, Any]:
    """With the models that are given, else those of the base's seeds."""
    return compare_learners(options, base_models(options, len(options.models) or options.learner_seeds))


MEASURES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "variants": compare_variants, "rounding": compare_rounding, "learners": compare_all_learners,
}  # fmt: skip


def check(options: Options) -> None:
    """Refuse names that do not exist, and settings that do not fit, before minutes are spent."""
    for what, names, known in (("part", options.parts, PARTS), ("variant", options.variants, tuple(VARIANTS))):
        wrong = [name for name in names if name not in known]
        if wrong:
            raise SystemExit(f"unknown {what} {wrong[0]!r}; there are {', '.join(known)}.")
    for variant in VARIANTS.values():
        run_config(options, variant, 0)  # raises where settings do not fit
    if options.width % (2 * HEAD_DIM):
        raise SystemExit(f"--width must be a multiple of {2 * HEAD_DIM}, got {options.width}.")


def main(options: Options) -> None:
    check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    where = machine(str(pick_device(options.device)))
    setting = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    found: dict[str, Any] = {"machine": where, "setting": setting, "seconds": {}}
    for part in options.parts:
        started = time.perf_counter()
        found[part] = MEASURES[part](options)
        found["seconds"][part] = time.perf_counter() - started
        write_json(options.json, found)
    print_table(
        f"Where the time went, {where}", ["part", "seconds"], [[k, f"{v:.0f}"] for k, v in found["seconds"].items()]
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
