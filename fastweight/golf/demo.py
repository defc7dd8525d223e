"""The demo: a small recurrent model on this machine, from text to a scored file, in minutes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastweight.audit import AuditSettings
from fastweight.configs import require
from fastweight.data import prepare
from fastweight.golf.auditing import audit_run
from fastweight.golf.folder import RunFolder
from fastweight.golf.ledger import Ledger
from fastweight.golf.run import finish
from fastweight.golf.settings import CalibrationSettings, EvalSettings, PackSettings
from fastweight.golf.training import calibrate, train_within
from fastweight.golf_presets import recurrent
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import Model
from fastweight.optim import AveragingConfig, OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, LoopConfig, TrainConfig

Say = Callable[[str], None]
SEQ_LEN, WINDOW = 256, 128
AUDITED_TOKENS = 16384
OVERLAP = 0.25  # files of one library have passages in common; the auditor says how much


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What may be changed of the demo."""

    steps: int = 480
    """Steps of 2,048 bytes; fewer are quicker and worse."""
    cap_bytes: int = 400_000
    """Bytes of the packed model and of the program that scores it, together."""
    seed: int = 0
    """Of the weights and of the order of the text."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"golf demo: steps must be at least 1, got {self.steps}.")
        require(self.cap_bytes >= 1, f"golf demo: cap_bytes must be positive, got {self.cap_bytes}.")


def run_demo(out: str | Path, settings: DemoSettings, *, source: str = "python-stdlib", say: Say) -> Ledger | None:
    """Prepare, train, pack, score, audit; returns the ledger, or None if a signal stopped the training.

    Everything is kept in `out`: the text in data, the run in run. Called again, it goes on. The whole held-out split is
    scored, one file in a hundred. Raises ValueError if `out` holds a demo with other settings.
    """
    out = Path(out)
    say(f"text      {source}, one document per file, a byte per token")
    # A finished store of the same source is taken as it is.
    prepare(source, "bytes", out / "data", heldout_fraction=0.01)
    folder = RunFolder(out / "run")
    trained = train_within(
        folder, demo_run(str(out / "data"), settings), "golf-demo", CalibrationSettings(tokens=1 << 15),
        model=demo_model(settings.seed),
    )  # fmt: skip
    if trained["stopped"]:
        return None
    calibrate(folder)
    ledger = finish(folder.path, PackSettings(cap_bytes=settings.cap_bytes), demo_scoring(), say=say)
    say("audit     the packed file while it learns, by experiment, on a part of the held-out text")
    audit_run(folder.path, demo_scoring(), demo_audit(settings), max_tokens=AUDITED_TOKENS)
    return ledger


def demo_model(seed: int) -> Model:
    """Three parallel blocks, four loops, for bytes; attention reaches back WINDOW bytes, so a state stays small."""
    config = recurrent(d_model=96, heads=4, kv_heads=2, loops=4, vocab_size=257)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(replace(config, blocks=tuple(replace(b, mixer=_windowed(b.mixer)) for b in config.blocks)))


def _windowed(mixer: object) -> AttentionConfig:
    assert isinstance(mixer, AttentionConfig)
    return replace(mixer, window=WINDOW)


def demo_run(store: str, settings: DemoSettings) -> TrainConfig:
    """What the records do, in small, by steps, so that it can be repeated bit by bit."""
    return TrainConfig(
        data=DataConfig(store=store, seq_len=SEQ_LEN, batch_size=8),
        optimizer=OptimizerConfig(
            name="muon", lr=0.02, muon_lr=0.02, muon_scale="original", muon_rows="equalised",
            muon_coefficients="polar-express", muon_momentum_first=0.85, muon_momentum_steps=100,
            lr_factors={"embedding.weight": 1.5}, weight_decay=0.05,
        ),
        schedule=ScheduleConfig(kind="linear", decay_fraction=0.6, final_ratio=0.1),
        averaging=AveragingConfig(kind="ema", decay=0.95),
        loops=LoopConfig(on_at=0.35),
        log=LogConfig(every=20, heldout_tokens=16384, checkpoint_every=60),
        steps=settings.steps,
        clip_norm=0.3,
        seed=settings.seed,
        device="cpu",
    )  # fmt: skip


def demo_audit(settings: DemoSettings) -> AuditSettings:
    """Few experiments, as minutes allow; drawn from the demo's seed, so that it can be repeated bit by bit."""
    return AuditSettings(
        excerpts=2, positions=4, excerpt_tokens=256, cap_bytes=settings.cap_bytes, overlap_share=OVERLAP,
        seed=settings.seed,
    )  # fmt: skip


def demo_scoring() -> EvalSettings:
    """Windows of SEQ_LEN bytes that slide by a quarter; down-projections that learn within each file."""
    return EvalSettings(
        stride=SEQ_LEN // 4, batch_size=16, document=True, learn_chunk=64, learn_rate=0.1, learn_batch_size=4
    )
