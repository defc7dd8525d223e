"""Optimisers, learning-rate schedules and weight averages of the slow weights; the fast ones learn in the layers."""

from fastweight.optim.averaging import AveragingConfig, WeightAverage
from fastweight.optim.groups import OptimizerConfig, ParameterGroup, parameter_groups
from fastweight.optim.muon import Muon
from fastweight.optim.optimizer import Optimizer
from fastweight.optim.orthogonal import orthogonalise
from fastweight.optim.schedules import ScheduleConfig, schedule_factor, weight_decay_factor

__all__ = [
    "AveragingConfig",
    "Muon",
    "Optimizer",
    "OptimizerConfig",
    "ParameterGroup",
    "ScheduleConfig",
    "WeightAverage",
    "orthogonalise",
    "parameter_groups",
    "schedule_factor",
    "weight_decay_factor",
]
