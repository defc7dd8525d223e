"""What a memory is worth: small models that differ in one layer, trained on the same tokens, several seeds each.

Every model alternates window attention with the named memory and has about the same number of parameters (the width of
the feed-forward makes up the difference). Held-out files are scored with the memory on and frozen.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.timing import machine, print_table, write_json
from fastweight import BlockConfig, FeedForwardConfig, MixerConfig, Model, ModelConfig, load
from fastweight.data import Store, prepare
from fastweight.evaluate import DocumentList, Evaluation, score
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, TrainConfig, train

WINDOW, WIDTH, BLOCKS, PARAMETERS = 32, 128, 4, 890_000
ATTENTION = AttentionConfig(num_heads=4, window=WINDOW)
DELTA = DeltaConfig(num_heads=2, head_dim=64, conv_width=2, output_gate=False)
MEMORIES: dict[str, MixerConfig] = {
    "window": ATTENTION,
    "full-attention": AttentionConfig(num_heads=4),
    "delta": DELTA,
    "delta-induction": replace(DELTA, init="induction"),
    "gated-delta": replace(DELTA, gated=True),
    "gated-delta-induction": replace(DELTA, gated=True, init="induction"),
    "ttt-linear": TTTLinearConfig(num_heads=2),
    "ttt-mlp": TTTMLPConfig(num_heads=2),
    "lact": LactConfig(num_heads=4, num_fast_heads=2, chunk_size=WINDOW, window=WINDOW, muon="separate", low_rank=16),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """steps of batch_size × seq_len bytes; held-out files longer than min_tokens are scored up to max_tokens."""

    steps: int = 800
    seq_len: int = 512
    batch_size: int = 4
    optimizer: str = "muon"
    device: str = "auto"
    min_tokens: int = 4096
    max_tokens: int = 8192


def model_config(memory: MixerConfig) -> ModelConfig:
    """Window, memory, window, memory; the feed-forward fills up to PARAMETERS."""
    mixers = [ATTENTION if i % 2 == 0 else memory for i in range(BLOCKS)]

    def build(hidden: int) -> ModelConfig:
        feed_forward = FeedForwardConfig(hidden=hidden)
        blocks = tuple(BlockConfig(mixer=m, feed_forward=feed_forward, pre_conv=4) for m in mixers)
        return ModelConfig(vocab_size=257, d_model=WIDTH, blocks=blocks, tie_embeddings=True)

    with torch.device("meta"):
        fixed = Model(build(8)).num_parameters
    return build(8 + 8 * round((PARAMETERS - fixed) / (8 * BLOCKS * 3 * WIDTH)))


def optimizer(name: str) -> OptimizerConfig:
    if name == "muon":
        return OptimizerConfig(name="muon", lr=2.5e-3, muon_lr=0.0175, muon_scale="original", weight_decay=0.0)
    return OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.1)


def run(memory: str, seed: int, setting: Setting, store: str) -> dict[str, Any]:
    """Train and score one model."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            data=DataConfig(store=store, seq_len=setting.seq_len, batch_size=setting.batch_size),
            optimizer=optimizer(setting.optimizer),
            schedule=ScheduleConfig(kind="linear", warmup_steps=min(30, setting.steps // 4), final_ratio=0.0),
            log=LogConfig(every=100, checkpoint_every=0),
            steps=setting.steps,
            seed=seed,
            device=setting.device,
        )
        torch.manual_seed(seed)
        result = train(config, out, model=Model(model_config(MEMORIES[memory])), quiet=True)
        device = "cuda" if torch.cuda.is_available() and setting.device != "cpu" else "cpu"
        model = load(result.model, device)
    documents = heldout(Store.open(store), setting)
    far = setting.min_tokens // 4
    found: dict[str, Any] = {"memory": memory, "seed": seed, "parameters": result.parameters, "tokens": result.tokens}
    for way in ("on", "frozen"):
        scored = score(model, documents, memory=way, seq_len=2048)
        found[way] = scored.bits_per_byte
        found[f"{way}_far"] = bits_per_byte(scored, far, setting.max_tokens)
    return found | {"train_seconds": result.seconds, "faults": result.fault_reports}


def heldout(store: Store, setting: Setting) -> DocumentList:
    split = store.split("heldout")
    texts = [split.document(i) for i in range(split.num_documents)]
    cut = setting.max_tokens + 1
    return DocumentList([(t[:cut], b[:cut]) for t, b in texts if len(t) > setting.min_tokens])


def bits_per_byte(scored: Evaluation, start: int, stop: int) -> float:
    buckets = [b for b in scored.positions if start <= b.center < stop]
    return sum(b.nats for b in buckets) / sum(b.bytes for b in buckets) / math.log(2)


def summarise(found: list[dict[str, Any]], name: str) -> str:
    values = [f[name] for f in found]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def columns(far: int) -> list[str]:
    """Heads of the table; far: from which byte on the later part of a document counts."""
    return ["memory", "parameters", "bits/byte", f"from byte {far} on", "the same, frozen", "training s"]


def report(results: list[dict[str, Any]]) -> list[list[object]]:
    rows: list[list[object]] = []
    for memory in dict.fromkeys(r["memory"] for r in results):
        found = [r for r in results if r["memory"] == memory]
        figures: list[Callable[[], str]] = [
            lambda f=found: summarise(f, "on"),
            lambda f=found: summarise(f, "on_far"),
            lambda f=found: summarise(f, "frozen_far"),
        ]
        seconds = statistics.median(f["train_seconds"] for f in found)
        rows.append([memory, f"{found[0]['parameters']:,}", *(make() for make in figures), f"{seconds:.0f}"])
    return sorted(rows, key=lambda row: str(row[2]))


def main(
    memories: tuple[str, ...] = tuple(MEMORIES),
    seeds: int = 3,
    jobs: int = 1,
    setting: Setting = Setting(),
    store: str = "",
    json: Path | None = None,
) -> None:
    """Train every memory with every seed and print means and standard deviations over the seeds.

    Args:
        memories: Which ones; "window" is the model without a memory.
        seeds: How many seeds.
        jobs: Models trained side by side, one thread each.
        setting: Length of training, optimiser, device.
        store: A byte-level token store; by default python-stdlib is prepared.
        json: Also write all numbers to this file.
    """
    unknown = sorted(set(memories) - set(MEMORIES))
    if unknown:
        raise SystemExit(f"unknown memories {', '.join(unknown)}; known: {', '.join(MEMORIES)}")
    with tempfile.TemporaryDirectory() as folder:
        if not store:
            prepare("python-stdlib", "bytes", folder)
        work = [(memory, seed) for seed in range(seeds) for memory in memories]
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(run, memory, seed, setting, store or folder) for memory, seed in work]
            results = []
            for future in futures:
                results.append(future.result())
                last = results[-1]
                print(f"{last['memory']} seed {last['seed']}: {last['on']:.3f} bits/byte, "
                      f"far {last['on_far']:.3f}, {last['train_seconds']:.0f} s", flush=True)  # fmt: skip
    far = setting.min_tokens // 4
    about = machine("cuda" if torch.cuda.is_available() and setting.device != "cpu" else "cpu")
    tokens = setting.steps * setting.seq_len * setting.batch_size
    title = f"{tokens:,} bytes of training, {setting.optimizer}, {seeds} seeds, {about['device']}"
    print_table(title, columns(far), report(results))
    write_json(json, {"machine": about, "setting": setting.__dict__, "results": results})


if __name__ == "__main__":
    tyro.cli(main)
