"""Training: one loop, resumable bit by bit, whose only output is a folder."""

from fastweight.train.checkpoint import export
from fastweight.train.config import (
    DataConfig,
    InnerRateWarmup,
    LogConfig,
    LoraConfig,
    ModelSource,
    ObjectiveConfig,
    TrainConfig,
)
from fastweight.train.folders import CheckpointError
from fastweight.train.loop import DivergedError
from fastweight.train.loops import LoopConfig
from fastweight.train.lora import merge_and_unload
from fastweight.train.metrics import read_metrics
from fastweight.train.rounding import RoundingConfig
from fastweight.train.run import load_run_config, train
from fastweight.train.tally import TrainResult

__all__ = [
    "CheckpointError",
    "DataConfig",
    "DivergedError",
    "InnerRateWarmup",
    "LogConfig",
    "LoopConfig",
    "LoraConfig",
    "ModelSource",
    "ObjectiveConfig",
    "RoundingConfig",
    "TrainConfig",
    "TrainResult",
    "export",
    "load_run_config",
    "merge_and_unload",
    "read_metrics",
    "train",
]
