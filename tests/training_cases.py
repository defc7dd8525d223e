"""A small corpus, a small model and small runs for the tests of training."""

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.convert.titanize import titanize
from fastweight.data import prepare
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, LoraConfig, ObjectiveConfig, TrainConfig
from fastweight.train.loop import Trainer

WORDS = [
    "the",
    "memory",
    "of",
    "a",
    "model",
    "learns",
    "while",
    "it",
    "reads",
    "what",
    "was",
    "written",
    "before",
    "and",
    "after",
]


def make_store(folder: Path, seed: int = 0) -> Path:
    """About 40 documents of 100 to 900 bytes, as a byte-level token store."""
    texts, rng = folder / "texts", random.Random(seed)
    texts.mkdir(parents=True)
    for i in range(40):
        words = rng.choices(WORDS, k=rng.randint(20, 160))
        (texts / f"{i:02d}.txt").write_text(" ".join(words) + ".\n")
    prepare(f"text:{texts}/*.txt", "bytes", folder / "store", heldout_fraction=0.2)
    return folder / "store"


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """Two delta layers, d_model 16, 257 bytes."""
    mixer = DeltaConfig(num_heads=2, head_dim=8)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=32))
    torch.manual_seed(seed)
    return Model(ModelConfig(vocab_size=257, d_model=16, blocks=(block, block))).to(dtype)


def attention_model(dtype: torch.dtype = torch.float32, seed: int = 0, d_model: int = 16) -> Model:
    """Two attention layers with grouped heads, 257 bytes."""
    mixer = AttentionConfig(num_heads=2, num_kv_heads=1)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=2 * d_model))
    torch.manual_seed(seed)
    return Model(ModelConfig(vocab_size=257, d_model=d_model, blocks=(block, block))).to(dtype)


def converted_model(dtype: torch.dtype = torch.float32, **options) -> Model:
    """`attention_model` with a memory beside each attention; half of the output is the memory's."""
    return titanize(attention_model(dtype), **({"mag_weight": 0.5} | options))


def tiny_config(store: Path | str, **changes) -> TrainConfig:
    """8 steps of 4 × 32 tokens, all logged. A key of a nested config ("lr", "view", ...) is put where it belongs."""
    config = TrainConfig(
        data=DataConfig(store=str(store), seq_len=32, batch_size=4),
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="linear", warmup_steps=2),
        log=LogConfig(every=1, checkpoint_every=0),
        steps=8,
        device="cpu",
    )
    for part in ("data", "optimizer", "schedule", "log"):
        nested = getattr(config, part)
        mine = {key: changes.pop(key) for key in list(changes) if key in nested.__dataclass_fields__}
        config = dataclasses.replace(config, **{part: dataclasses.replace(nested, **mine)})
    return dataclasses.replace(config, **changes)


# Every way to train a part of a converted model, as settings for `tiny_config`.
PARTIAL = {
    "transfer": {"objective": ObjectiveConfig(kind="transfer", cosine=0.5), "trainable": ("memory",)},
    "distill": {"objective": ObjectiveConfig(kind="distill", alpha=0.3, temperature=2.0), "trainable": ("memory",)},
    "distill-lora": {
        "objective": ObjectiveConfig(kind="distill"),
        "trainable": ("lora",),
        "lora": LoraConfig(rank=2, dropout=0.2),
    },
    "lora-bins-mag": {
        "trainable": ("lora",),
        "lora": LoraConfig(rank=2, dropout=0.1),
        "mag": MagSchedule(kind="cosine", initial=0.1, final=0.9, steps=6),
        "view": "bins",
        "seq_len": 64,
    },
    "patterns": {"trainable": ("*.feed_forward.*", "norm.weight"), "micro_batch_size": 2},
}

# Seconds of work where cores are free; on busy ones importing torch alone may take a minute.
ELSEWHERE_SECONDS = 270

PRELUDE = """
import sys, os, signal, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from training_cases import *
from fastweight.train import *
out = {out!r}
store = {store!r}
"""


def run_elsewhere(code: str, out: Path, store: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python process that knows `out`, `store` and everything of this module."""
    command = [sys.executable, "-c", prelude(out, store) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=ELSEWHERE_SECONDS)


def prelude(out: Path, store: Path) -> str:
    """What a new Python process runs first to know `out`, `store` and everything of this module."""
    return PRELUDE.format(tests=str(Path(__file__).parent), out=str(out), store=str(store))


def call_at_forward(model: Model, number: int, action) -> Model:
    """Call action() when `model` starts its forward pass number `number` (0, 1, ...)."""
    seen = iter(range(10**6))
    model.embedding.register_forward_pre_hook(lambda module, args: action() if next(seen) == number else None)
    return model


def clock_of_steps(monkeypatch, seconds: float) -> None:
    """The time that training sees from now on: a step takes `seconds`, and nothing else takes any."""
    now, step = [0.0], Trainer.step

    def timed(self, batches):
        step(self, batches)
        now[0] += seconds

    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr("fastweight.train.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
