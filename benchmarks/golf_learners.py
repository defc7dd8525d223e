"""The part of `benchmarks.golf` that runs learners: which rate is best, and what reading only once saves."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.golf_options import LEARNERS, Changes, Options, narrow, spread
from benchmarks.timing import print_table
from fastweight.data import Store
from fastweight.devices import pick_device
from fastweight.evaluate import score, score_and_learn
from fastweight.evaluate.reading import Document
from fastweight.learn import GlobalSgd
from fastweight.model import Model, load


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


def compare_learners(options: Options, folders: list[Path]) -> dict[str, Any]:
    """Each learner's best rate on some documents with the first model, then on others with all of `folders`."""
    device, (tuning, texts) = pick_device(options.device), documents(options)
    models = [load(path, device).eval() for path in folders]
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
