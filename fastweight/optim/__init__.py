"""Optimisers and learning-rate schedules for the slow weights; the fast weights learn inside the layers."""

from fastweight.optim.groups import OptimizerConfig, ParameterGroup, parameter_groups
from fastweight.optim.optimizer import Optimizer
from fastweight.optim.schedules import ScheduleConfig, schedule_factor

__all__ = ["Optimizer", "OptimizerConfig", "ParameterGroup", "ScheduleConfig", "parameter_groups", "schedule_factor"]
