"""The demo: two small models of one size, trained on the same text; one has a memory, the other only a window.

Everything happens on this machine: the text is the running interpreter's own standard library.
"""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastweight.configs import require, to_json
from fastweight.data import Store, prepare
from fastweight.evaluate import DocumentList, Evaluation, score
from fastweight.files import write_text
from fastweight.generate import generate
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.base import MixerConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig, load, load_config
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.plots import plot_loss_by_position
from fastweight.train import DataConfig, LogConfig, TrainConfig, load_run_config, train

WINDOW = 32
PICTURE = "loss_by_position.png"
Say = Callable[[str], None]
Bar = Callable[[str, str], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """steps of batch_size × seq_len bytes: the training of each of the two models, in the same order.

    documents: held-out files scored, each at least min_tokens long and cut at max_tokens. prompt_tokens, new_tokens:
    how much of a held-out file is read, and continued.
    """

    steps: int = 720
    seq_len: int = 512
    batch_size: int = 4
    documents: int = 24
    min_tokens: int = 4096
    max_tokens: int = 8192
    prompt_tokens: int = 3000
    new_tokens: int = 300
    seed: int = 0


def memory_config() -> ModelConfig:
    """Window attention and delta-rule memory in turns."""
    window = AttentionConfig(num_heads=4, window=WINDOW)
    memory = DeltaConfig(num_heads=2, head_dim=64, conv_width=2, output_gate=False, init="induction")
    return _model_config([window, memory, window, memory], hidden=384)


def window_config() -> ModelConfig:
    """Window attention alone."""
    return _model_config([AttentionConfig(num_heads=4, window=WINDOW)] * 4, hidden=384)


def _model_config(mixers: list[MixerConfig], hidden: int) -> ModelConfig:
    blocks = [BlockConfig(mixer=m, feed_forward=FeedForwardConfig(hidden=hidden), pre_conv=4) for m in mixers]
    return ModelConfig(vocab_size=257, d_model=128, blocks=tuple(blocks), tie_embeddings=True)


def run(out: str | Path, config: DemoConfig | None = None, *, say: Say = print, bar: Bar) -> dict[str, Any]:
    """Prepare, train both models, score, draw, continue a file; return the figures. What `out` already holds is kept.

    say: takes each line of the report. bar(what, unit): context of a progress bar that is called with (done, total).
    """
    config, out, began = config or DemoConfig(), Path(out), time.perf_counter()
    store = _prepare(out / "data", say)
    runs = {name: _train(name, out, make(), config, say) for name, make in MODELS.items()}
    documents = _heldout(store, config)
    scores = _score(out, documents, say, bar)
    picture = out / PICTURE
    plot_loss_by_position(scores, picture, title=f"Held-out Python files; every attention window is {WINDOW} bytes")
    text = _continue(out, store, documents, config)
    result = {
        "documents": documents.num_documents,
        "window_tokens": WINDOW,
        "picture": str(picture),
        "training": runs,
        "scores": {name: _figures(scored, config) for name, scored in scores.items()},
        "continued": text,
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_text(out / "result.json", to_json(result) + "\n")
    return result


MODELS = {"memory": memory_config, "window": window_config}


def _prepare(folder: Path, say: Say) -> Store:
    say("text: the standard library of this Python, one document per file, a byte per token")
    prepare("python-stdlib", "bytes", folder)
    store = Store.open(folder)
    for name in ("train", "heldout"):
        split = store.split(name)
        say(f"  {name}: {split.num_documents:,} files, {split.num_bytes:,} bytes")
    return store


def _train(name: str, out: Path, model_config: ModelConfig, config: DemoConfig, say: Say) -> dict[str, Any]:
    """Train one model, go on with a run that was interrupted, or take the finished one that `out` holds already."""
    folder, record = out / name, out / name / "demo.json"
    plan = TrainConfig(
        data=DataConfig(store=str(out / "data"), seq_len=config.seq_len, batch_size=config.batch_size),
        optimizer=OptimizerConfig(name="muon", lr=2.5e-3, muon_lr=0.0175, muon_scale="original", weight_decay=0.0),
        schedule=ScheduleConfig(kind="linear", warmup_steps=min(30, config.steps // 4), final_ratio=0.0),
        log=LogConfig(every=20, checkpoint_every=100),
        steps=config.steps,
        seed=config.seed,
        device="cpu",
    )
    if record.is_file():
        before = load_run_config(folder)
        require(
            # The folder may have moved, or be named another way: where the data lies is no setting.
            replace(before, data=replace(before.data, store=plan.data.store)) == plan
            and load_config(folder / "model") == model_config,
            f"{folder} holds a run with other settings. Remove it, or choose another folder with --out.",
        )
        say(f"{name}: trained before (remove {folder} to train again)")
        return json.loads(record.read_text())
    interrupted = (folder / "latest").is_file()
    say(f"{name}: {config.steps} steps of {config.batch_size} × {config.seq_len} bytes")
    torch.manual_seed(config.seed)
    result = train(plan, folder, resume=interrupted, model=None if interrupted else Model(model_config))
    if result.stopped:
        raise KeyboardInterrupt(f"training was stopped by {result.stopped}")
    figures = {"parameters": result.parameters, "tokens": result.tokens, "seconds": round(result.seconds, 1)}
    figures["tokens_per_second"] = round(result.tokens_per_second)
    write_text(record, to_json(figures) + "\n")
    return figures


def _heldout(store: Store, config: DemoConfig) -> DocumentList:
    """The first long held-out files, cut to one length at most."""
    split, found = store.split("heldout"), []
    for i in range(split.num_documents):
        tokens, num_bytes = split.document(i)
        if len(tokens) > config.min_tokens and len(found) < config.documents:
            found.append((tokens[: config.max_tokens + 1], num_bytes[: config.max_tokens + 1]))
    return DocumentList(found)


def _score(out: Path, documents: DocumentList, say: Say, bar: Bar) -> dict[str, Evaluation]:
    say(f"scoring {documents.num_documents} held-out files")
    ways = {"memory on": ("memory", "on"), "memory frozen": ("memory", "frozen"), "window only": ("window", "on")}
    scores = {}
    for label, (name, memory) in ways.items():
        with bar(label, "bytes") as update:
            model = load(out / name / "model")
            scores[label] = score(model, documents, memory=memory, seq_len=2048, batch_size=8, progress=update)
    return scores


def _figures(scored: Evaluation, config: DemoConfig) -> dict[str, Any]:
    """Bits per byte overall, near the start, and far from it."""

    def part(start: int, stop: int) -> float:
        buckets = [b for b in scored.positions if start <= b.center < stop]
        return round(sum(b.nats for b in buckets) / sum(b.bytes for b in buckets) / math.log(2), 4)

    return {
        "bits_per_byte": round(scored.bits_per_byte, 4),
        "bits_per_byte_first_256": part(0, 256),
        f"bits_per_byte_from_{config.min_tokens // 4}": part(config.min_tokens // 4, config.max_tokens + 1),
        "bytes": scored.bytes,
        "seconds": round(scored.seconds, 1),
    }


def _continue(out: Path, store: Store, documents: DocumentList, config: DemoConfig) -> dict[str, Any]:
    """Read the start of a held-out file and write on."""
    model, tokenizer = load(out / "memory" / "model"), store.tokenizer
    prompt = documents.document(0)[0][: config.prompt_tokens]
    began = time.perf_counter()
    made = generate(model, prompt, max_tokens=config.new_tokens, temperature=0.7, seed=config.seed)
    ids = list(made)
    return {
        "prompt_end": tokenizer.decode(prompt[-200:]),
        "text": tokenizer.decode(ids),
        "seconds": round(time.perf_counter() - began, 1),
        "state_bytes": made.state.num_bytes,
    }
