"""Quick runs: models of a few hundred thousand parameters that learn something on two CPU cores in a minute."""

from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.presets import preset_names
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


def _register(preset: str) -> None:
    def make() -> TrainConfig:
        return tiny(preset)

    make.__doc__ = f"The preset {preset}: 400 steps of 2,048 bytes, minutes on two CPU cores."
    register(preset)(make)


for _preset in preset_names():
    if _preset.startswith("tiny-"):
        _register(_preset)
