"""A contest run so small that all of it takes seconds."""

import tempfile
from pathlib import Path

import torch
from training_cases import tiny_config

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig
from fastweight.golf.folder import RunFolder
from fastweight.golf.program import write_program
from fastweight.golf.settings import CalibrationSettings, EvalSettings, PackSettings
from fastweight.golf.training import calibrate, train_within
from fastweight.mixers.attention import AttentionConfig
from fastweight.optim import AveragingConfig

# Calibration in several rounds of batches; without one it would be as if there were one rank.
CALIBRATION = CalibrationSettings(tokens=640, seconds=5.0, margin=1.0)
# The program grows with the library; the model gets 15,000 bytes in any case.
with tempfile.TemporaryDirectory() as _folder:
    PROGRAM_BYTES = write_program(Path(_folder) / "program.zip")["bytes"]
PACK = PackSettings(cap_bytes=PROGRAM_BYTES + 15_000)
SCORING = EvalSettings(
    seq_len=32, stride=8, batch_size=4, learner="in-place", learn_chunk=16, learn_rate=0.3, max_tokens=1500
)


def golf_model(seed: int = 0) -> Model:
    """A prelude and a core that is visited twice; some 18 thousand weights, in float32."""
    torch.manual_seed(seed)
    mixer = AttentionConfig(num_heads=2, qk_norm="head", window=24)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=64))
    return Model(
        ModelConfig(vocab_size=257, d_model=32, blocks=(block, block), loops=(1, 2, 2), tie_embeddings=True)
    )  # fmt: skip


def golf_config(store: Path, **changes):
    averaging = AveragingConfig(kind="ema", decay=0.8)
    return tiny_config(store, **({"averaging": averaging, "steps": 12, "name": "muon", "lr": 0.02} | changes))


def trained_run(path: Path, store: Path, *, seed: int = 0, variant: str = "tiny", **changes) -> RunFolder:
    """A run whose training has ended, without Hessians yet."""
    folder = RunFolder(path)
    config = golf_config(store, seed=seed, **changes)
    train_within(folder, config, variant, CALIBRATION, model=golf_model(seed), quiet=True)
    return folder


def calibrated_run(path: Path, store: Path, **changes) -> RunFolder:
    folder = trained_run(path, store, **changes)
    calibrate(folder)
    return folder
