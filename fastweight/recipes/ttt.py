"""The published runs of TTT-Linear, TTT-MLP and their Transformer baseline (Sun et al. 2024, arXiv:2407.04620).

The settings are those of the training scripts in the repository test-time-training/ttt-lm-jax: AdamW with weight decay
on every parameter, warm-up from rate 0 over a tenth of the steps, cosine to 1e-5, 2^19 tokens per step, float32.
"""

from typing import NamedTuple

from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.recipes.registry import register
from fastweight.train import DataConfig, InnerRateWarmup, LogConfig, ModelSource, TrainConfig

TOKENS_PER_STEP = 1 << 19


class Size(NamedTuple):
    """Steps and peak rate of one size; the warm-up is a tenth of the steps."""

    steps: int
    lr: float


SIZES = {"125m": Size(4800, 3e-3), "350m": Size(13500, 1.5e-3), "760m": Size(29000, 1.25e-3), "1.3b": Size(50000, 1e-3)}
FAMILIES = ("ttt-linear", "ttt-mlp", "transformer")


def ttt_run(family: str, size: str, seq_len: int = 2048) -> TrainConfig:
    """The published run of one family and size; batch_size keeps 2^19 tokens per step for any power-of-two seq_len.

    TTT-MLP warms its base inner rate up from 0.01 to 0.1 beside the outer warm-up. micro_batch_size only bounds memory.
    """
    steps, lr = SIZES[size]
    warmup, batch_size, rows = steps // 10, TOKENS_PER_STEP // seq_len, max(1, 16384 // seq_len)
    return TrainConfig(
        model=ModelSource(preset=f"{family}-{size}", vocab_size=32000),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size, micro_batch_size=rows),
        optimizer=OptimizerConfig(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decay_exclude=()),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=warmup, zero_first=True, final_lr=1e-5),
        inner_rate=InnerRateWarmup(steps=warmup if family == "ttt-mlp" else 0, first_ratio=0.1),
        log=LogConfig(every=10, stats_every=2000, stats_tokens=seq_len, checkpoint_every=1000),
        steps=steps,
        clip_norm=1.0,
        seed=0,
    )


def _register(family: str, size: str) -> None:
    def make() -> TrainConfig:
        return ttt_run(family, size)

    make.__doc__ = f"{family}, {size}: the published run with windows of 2048 tokens."
    register(f"{family}-{size}")(make)


for _family in FAMILIES:
    for _size in SIZES:
        _register(_family, _size)
