"""Quick runs: models of a few hundred thousand parameters that learn something on two CPU cores in a minute."""

from fastweight.mixers import mixer_kinds
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.recipes.registry import register
from fastweight.train import DataConfig, LogConfig, ModelSource, TrainConfig


def tiny(preset: str) -> TrainConfig:
    """400 steps of 8 × 256 tokens with Muon; peak rate 4e-3, the last fifth decays."""
    return TrainConfig(
        model=ModelSource(preset=preset),
        data=DataConfig(seq_len=256, batch_size=8),
        optimizer=OptimizerConfig(name="muon", lr=4e-3),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=20, final_ratio=0.0),
        log=LogConfig(every=10, heldout_every=200, heldout_tokens=16384, checkpoint_every=200),
        steps=400,
    )


def _register(kind: str) -> None:
    def make() -> TrainConfig:
        return tiny(f"tiny-{kind}")

    make.__doc__ = f"A tiny model of {kind} layers: 400 steps, about a minute on two CPU cores."
    register(f"tiny-{kind}")(make)


for _kind in mixer_kinds():
    _register(_kind.replace("_", "-"))
