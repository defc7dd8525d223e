"""Ten minutes on one GPU for the models of the Parameter Golf contest (repository openai/parameter-golf).

Rates, batches and decays are those of the contest's baseline and of its records. Their decay is a part of the time: the
run ends by the clock, so `steps` is only a bound that no run reaches. What counts steps, averaging and the warm-up of
the momentum, is shorter than in records, for eight GPUs make eight times as many of them.
"""

from typing import Any

from fastweight.optim import AveragingConfig, OptimizerConfig, ScheduleConfig
from fastweight.recipes.registry import register
from fastweight.train import DataConfig, LogConfig, LoopConfig, ModelSource, TrainConfig

STEPS = 20_000
SECONDS = 600.0


def golf_run(
    preset: str, *, data: DataConfig, rate: float, scalar_rate: float, embedding_rate: float, decay: float,
    floor: float, weight_decay: float = 0.0, weight_decay_end: float = 1.0, clip_norm: float = 0.0,
    averaging: AveragingConfig | None = None, loops: LoopConfig | None = None, **muon: Any,
) -> TrainConfig:  # fmt: skip
    """Muon for matrices, Adam for the rest, a linear decay over the last part `decay` of the time down to `floor`."""
    return TrainConfig(
        model=ModelSource(preset=preset),
        data=data,
        optimizer=OptimizerConfig(
            name="muon", lr=scalar_rate, muon_lr=rate, muon_scale="original", weight_decay=weight_decay,
            lr_factors={"embedding.weight": embedding_rate / scalar_rate}, **muon,
        ),
        schedule=ScheduleConfig(
            kind="linear", decay_fraction=decay, final_ratio=floor, weight_decay_final_ratio=weight_decay_end
        ),
        averaging=averaging or AveragingConfig(),
        loops=loops or LoopConfig(),
        log=LogConfig(every=10, before_after=True, heldout_tokens=1 << 20, checkpoint_every=0),
        steps=STEPS,
        max_seconds=SECONDS,
        clip_norm=clip_norm,
        seed=1337,
        precision="bfloat16",
        compile=True,
    )  # fmt: skip


def record_run(preset: str, loops: LoopConfig | None = None) -> TrainConfig:
    """What the records do: MuonEq-R with Polar Express, averaged weights, decay over three quarters of the time to a
    tenth, strong weight decay that falls to half of itself at the end."""
    return golf_run(
        preset, data=DataConfig(seq_len=2048, batch_size=256, micro_batch_size=32), rate=0.022,
        scalar_rate=0.02, embedding_rate=0.03, decay=0.75, floor=0.1, weight_decay=0.095, weight_decay_end=0.5,
        clip_norm=0.3, averaging=AveragingConfig(kind="ema", decay=0.99), loops=loops, muon_rows="equalised",
        muon_coefficients="polar-express", muon_momentum=0.97, muon_momentum_first=0.92, muon_momentum_steps=300,
    )  # fmt: skip


@register("golf-baseline-9x512")
def golf_baseline() -> TrainConfig:
    """The contest's baseline for ten minutes: 2^19 tokens per step, its 1,200 steps of decay are 86 % of one GPU's."""
    data = DataConfig(seq_len=1024, batch_size=512, micro_batch_size=64)
    return golf_run(
        "golf-baseline-9x512", data=data, rate=0.04, scalar_rate=0.04, embedding_rate=0.05, decay=0.86, floor=0.0,
        muon_momentum=0.95, muon_momentum_first=0.85, muon_momentum_steps=500,
    )  # fmt: skip


@register("golf-record-11x512")
def golf_record() -> TrainConfig:
    """The record's shape for ten minutes; blocks 3 to 5 are looped from 35 % of the time on."""
    return record_run("golf-record-11x512", LoopConfig(on_at=0.35))


@register("recurrent-3x8")
def recurrent() -> TrainConfig:
    """Three blocks, eight loops, for ten minutes at the record's rates."""
    return record_run("recurrent-3x8")
