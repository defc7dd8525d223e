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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.timing import machine, print_table, write_json
from fastweight.artifact import Hessians, PackSpec, collect_hessians, fit_to_size, unpack
from fastweight.data import Store, Windows, loader
from fastweight.devices import pick_device
from fastweight.evaluate import score, score_and_learn
from fastweight.evaluate.reading import Document
from fastweight.golf_presets import record
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.model import Model, load
from fastweight.optim import AveragingConfig, OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, LoopConfig, TrainConfig, train

BASE = "base"
PARTS = ("variants", "rounding", "learners")
HEAD_DIM = 64
Changes = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What differs from the base run: fields of the optimiser, of the run, and how often the core is visited."""

    optimizer: Changes = dataclasses.field(default_factory=dict)
    run: Changes = dataclasses.field(default_factory=dict)
    loops: int = 3


# The base: MuonEq-R, Polar Express, EMA, three loops from the first step on.
VARIANTS = {
    BASE: Variant(),
    "adamw": Variant({"name": "adamw", "lr": 3e-3, "muon_rows": "none", "muon_coefficients": "quintic"}),
    "muon, quintic": Variant({"muon_rows": "none", "muon_coefficients": "quintic"}),
    "no MuonEq-R": Variant({"muon_rows": "none"}),
    "no polar express": Variant({"muon_coefficients": "quintic"}),
    "NorMuon": Variant({"normuon": True}),
    "cautious decay": Variant({"muon_cautious": True}),
    "1 loop": Variant(loops=1),
    "2 loops": Variant(loops=2),
    "4 loops": Variant(loops=4),
    "loops on at 35 %": Variant(run={"loops": LoopConfig(on_at=0.35)}),
    "swa": Variant(run={"averaging": AveragingConfig(kind="swa", every=5, start_factor=0.4)}),
}
LEARNERS: dict[str, tuple[type[InPlaceSgd] | type[DocumentLora] | type[GlobalSgd], tuple[float, ...]]] = {
    "in-place": (InPlaceSgd, (0.03, 0.1, 0.3)),
    "lora": (DocumentLora, (3e-4, 1e-3, 3e-3)),
    "sgd": (GlobalSgd, (1e-3, 3e-3, 1e-2)),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how long that takes. On one H100 the defaults are meant for 8 minutes: 5 of variants, 1 of
    rounding, 2 of learners."""

    store: Path
    """A token store with a held-out split (`fastweight data prepare`)."""
    out: Path
    """Folder for the trained models and for what was found."""
    parts: tuple[str, ...] = PARTS
    """variants, rounding, learners; the last two train what they need of the base."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of them."""
    models: tuple[Path, ...] = ()
    """Model folders for roundings (the first) and learners (all), in place of the base's."""
    seeds: int = 2
    """Seeds of each variant."""
    learner_seeds: int = 3
    """Seeds of the base whose models the learners are run with."""
    width: int = 256
    """Width of the model, in heads of 64; the contest's is 512."""
    steps: int = 300
    """Steps of a run."""
    seq_len: int = 2048
    """Tokens per window."""
    batch_size: int = 32
    """Windows per step, and side by side in an evaluation."""
    heldout_tokens: int = 1 << 19
    """Held-out tokens that variants and roundings are scored on."""
    bits_per_weight: tuple[float, ...] = (3.0, 3.5, 4.5)
    """Sizes of the packed files."""
    calibration_tokens: int = 1 << 19
    """Training tokens that GPTQ sees."""
    tune_tokens: int = 1 << 16
    """Held-out tokens that the rates of the learners are chosen on."""
    learn_tokens: int = 1 << 17
    """Further held-out tokens that they are measured on."""
    document_tokens: int = 4096
    """Of longer documents, the learners read so much."""
    learn_chunk: int = 64
    """Targets between two steps in a document."""
    sgd_chunk: int = 4096
    """Targets between two steps of the global learner."""
    jobs: int = 1
    """Training processes at a time, on one device."""
    device: str = "auto"
    """Where everything runs."""
    compile: bool = False
    """Compile the blocks for training."""
    threads: int = 0
    """Threads of each process; 0: torch's own number."""
    json: Path | None = None
    """Also write all numbers to this file."""


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
        name="muon", lr=0.02, muon_lr=0.022, muon_scale="original", weight_decay=0.095, muon_rows="equalised",
        muon_coefficients="polar-express", muon_momentum=0.97, muon_momentum_first=0.92,
        muon_momentum_steps=options.steps // 4, lr_factors={"embedding.weight": 1.5},
    )  # fmt: skip
    config = TrainConfig(
        data=DataConfig(store=str(options.store), seq_len=options.seq_len, batch_size=options.batch_size),
        optimizer=dataclasses.replace(optimizer, **variant.optimizer),
        schedule=ScheduleConfig(kind="linear", decay_fraction=0.75, final_ratio=0.1, weight_decay_final_ratio=0.5),
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
    assert result.raw is not None
    assert result.after is not None
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


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and standard deviation where there are several."""
    apart = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{apart}"


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


def narrow(options: Options) -> torch.autocast:
    """bfloat16 on a GPU."""
    kind = pick_device(options.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


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


def documents(options: Options) -> tuple[list[Document], list[Document]]:
    """Held-out documents to choose rates on, and others to measure on; of long ones the beginning."""
    split = Store.open(options.store).split("heldout")
    parts: tuple[list[Document], list[Document]] = ([], [])
    room = [options.tune_tokens, options.learn_tokens]
    for i in range(split.num_documents):
        place = 0 if room[0] > 0 else 1
        if room[place] <= 0:
            break
        tokens, num_bytes = (np.asarray(x)[: options.document_tokens + 1] for x in split.document(i))
        parts[place].append((tokens, num_bytes))
        room[place] -= len(tokens) - 1
    if not parts[1]:
        raise SystemExit("the held-out split is too short for --tune-tokens; lower it.")
    return parts


def learn(options: Options, model: Model, texts: list[Document], kind: str, rate: float, mode: str) -> dict[str, Any]:
    """One learner at one rate."""
    make, _ = LEARNERS[kind]
    own: Changes = {"chunk_size": options.learn_chunk}
    if make is GlobalSgd:
        own = {"chunk_size": options.sgd_chunk, "seq_len": options.seq_len, "batch_size": options.batch_size}
    learner = make(lr=rate, **own)
    with narrow(options):
        found = score_and_learn(
            model, texts, learner, mode=mode, seq_len=options.seq_len, stride=max(1, options.seq_len // 4),
            batch_size=options.batch_size,
        )  # fmt: skip
    return {
        "learner": kind, "rate": rate, "mode": mode, "bits_per_byte": found.bits_per_byte, "seconds": found.seconds,
        "tokens": found.tokens, "forwarded_per_token": found.forwarded_per_token,
    }  # fmt: skip


def compare_learners(options: Options) -> dict[str, Any]:
    """Each learner's best rate on some documents with one model, then on others with the models of all seeds."""
    device, (tuning, texts) = pick_device(options.device), documents(options)
    models = [load(path, device).eval() for path in base_models(options, len(options.models) or options.learner_seeds)]
    plain = [without(options, model, texts) for model in models]
    tuned: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for kind, (_, rates) in LEARNERS.items():
        tried = [learn(options, models[0], tuning, kind, rate, "cached") for rate in rates]
        best = min(tried, key=lambda r: r["bits_per_byte"])["rate"]
        tuned += tried
        for mode in ("cached", "exact"):
            for seed, model in enumerate(models):
                found.append({"seed": seed} | learn(options, model, texts, kind, best, mode))
    print_learners(options, plain, tuned, found)
    return {"without": plain, "rates": tuned, "best": found}


def without(options: Options, model: Model, texts: list[Document]) -> dict[str, Any]:
    """The same documents without learning: the state carried on, and in windows that slide by a quarter."""
    reading: dict[str, Any] = {"seq_len": options.seq_len, "batch_size": options.batch_size}
    with narrow(options):
        whole = score(model, texts, context="document", **reading)
        sliding = score(model, texts, context="windows", stride=max(1, options.seq_len // 4), **reading)
    return {
        "document": whole.bits_per_byte, "document_seconds": whole.seconds, "sliding": sliding.bits_per_byte,
        "sliding_seconds": sliding.seconds, "sliding_forwarded_per_token": sliding.forwarded_per_token,
    }  # fmt: skip


def print_learners(
    options: Options, plain: list[dict[str, Any]], tuned: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """Two tables: the rates tried, and the best rate of each learner over the seeds."""
    rows = [[r["learner"], f"{r['rate']:g}", f"{r['bits_per_byte']:.4f}"] for r in tuned]
    print_table("Rates, cached, one model, documents to choose on", ["learner", "rate", "bits/byte"], rows)
    rows = [
        ["none, documents", "", "", spread([p["document"] for p in plain]), "", "1.00",
         f"{statistics.mean(p['document_seconds'] for p in plain):.1f}", ""],
        ["none, sliding", "", "", spread([p["sliding"] for p in plain]), "",
         f"{plain[0]['sliding_forwarded_per_token']:.2f}",
         f"{statistics.mean(p['sliding_seconds'] for p in plain):.1f}", ""],
    ]  # fmt: skip
    for kind in LEARNERS:
        modes = {mode: [r for r in found if (r["learner"], r["mode"]) == (kind, mode)] for mode in ("cached", "exact")}
        seconds = {mode: statistics.mean(r["seconds"] for r in runs) for mode, runs in modes.items()}
        for mode, runs in modes.items():
            gain = [r["bits_per_byte"] - p["document"] for r, p in zip(runs, plain, strict=True)]
            faster = f"{seconds['exact'] / seconds['cached']:.1f} ×" if mode == "cached" else ""
            rows.append([
                kind, f"{runs[0]['rate']:g}", mode, spread([r["bits_per_byte"] for r in runs]), spread(gain, "+.4f"),
                f"{runs[0]['forwarded_per_token']:.2f}", f"{seconds[mode]:.1f}", faster,
            ])  # fmt: skip
    columns = ["learner", "rate", "mode", "bits/byte", "less documents", "read/token", "seconds", "faster than exact"]
    print_table(f"Learners, {len(plain)} models, other documents", columns, rows)


MEASURES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "variants": compare_variants, "rounding": compare_rounding, "learners": compare_learners,
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
    setting = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
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
