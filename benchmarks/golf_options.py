"""What `benchmarks.golf` can vary, and what it is told."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastweight.devices import pick_device
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.optim import AveragingConfig
from fastweight.train import LoopConfig

BASE = "base"
PARTS = ("variants", "rounding", "learners")
HEAD_DIM = 64
LR = 0.02  # of all that is no matrix; embeddings 1.5 times that
Changes = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """What differs from the base run: fields of the optimiser, of the run, how often the core is visited, and the part
    of the steps in which the rate rises."""

    optimizer: Changes = dataclasses.field(default_factory=dict)
    run: Changes = dataclasses.field(default_factory=dict)
    loops: int = 3
    warmup: float = 0.0


def adamw(rate: float) -> Variant:
    """AdamW for the matrices as well, at a rate of their own and with the warm-up that it wants; all else as it is."""
    optimizer: Changes = {"name": "adamw", "muon_rows": "none", "muon_coefficients": "quintic"}
    optimizer["lr_factors"] = {"embedding.weight": 1.5, "blocks.*.weight": rate / LR}
    return Variant(optimizer, warmup=0.1)


# The base: MuonEq-R, Polar Express, EMA, three loops from the first step on.
VARIANTS = {
    BASE: Variant(),
    "AdamW, 0.001": adamw(0.001),
    "AdamW, 0.003": adamw(0.003),
    "AdamW, 0.01": adamw(0.01),
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
    "in-place": (InPlaceSgd, (0.003, 0.01, 0.03, 0.1, 0.3)),
    "lora": (DocumentLora, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    "sgd": (GlobalSgd, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
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


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and standard deviation where there are several."""
    apart = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{apart}"


def narrow(options: Options) -> torch.autocast:
    """bfloat16 on a GPU."""
    kind = pick_device(options.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
