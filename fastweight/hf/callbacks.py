"""Callbacks for the Trainer that move the weight μ of the memories in a converted model."""

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastweight.configs import require
from fastweight.convert.mag import find_model, follow_schedule, liza_layers, mag_weights
from fastweight.convert.mag_schedule import MagSchedule


class MagScheduleCallback(TrainerCallback, ExportableState):
    """Sets μ of every LiZA layer from a schedule, before the first optimiser step and after each.

    Optimiser step s + 1 runs at schedule.at(s); when K steps are done, what is logged, evaluated and saved is the model
    at schedule.at(K). The value is a function of the step, so a resumed run goes on where it stopped. Every log entry
    has `mag_weight`, the mean over heads and layers, and where they differ `mag_weight_min` and `mag_weight_max`.

    model: a titanized Model, its Hugging Face face, or either inside PEFT; None for the one that the Trainer trains.
    schedule: a MagSchedule, or its JSON form.
    Raises ValueError for a model without LiZA layers or with a learned μ, and when training starts for another model
    than `model` or ends before the schedule does.
    """

    def __init__(self, model: nn.Module | None, schedule: MagSchedule | dict[str, Any]):
        self.schedule = MagSchedule.from_dict(schedule) if isinstance(schedule, dict) else schedule
        self.model = model
        if model is not None:
            self._check_model(model)

    def state(self) -> dict[str, Any]:
        """What trainer_state.json keeps."""
        return {"args": {"model": None, "schedule": self.schedule.to_dict()}, "attributes": {}}

    def precede(self, trainer: Any) -> None:
        """Take the first place among the callbacks of `trainer`, so that those that transformers puts before all others
        (`report_to`: TensorBoard, Weights & Biases …) report μ, too. Raises ValueError if it is none of them yet."""
        callbacks = trainer.callback_handler.callbacks
        known = any(one is self for one in callbacks)
        require(known, f"{type(self).__name__}: give it to Trainer(callbacks=[...]) first, then call precede(trainer).")
        callbacks[:] = [self, *(one for one in callbacks if one is not self)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = kwargs["model"]
        require(
            self.model is None or find_model(self.model) is find_model(trained),
            f"{type(self).__name__}: its model is not the one that the Trainer trains. Give the same to both.",
        )
        self.model = trained
        self._check_model(trained)
        end = self.schedule.end(len(liza_layers(trained)))
        require(
            end <= state.max_steps,
            f"{type(self).__name__}: the schedule reaches its final value at step {end}, but training ends at step "
            f"{state.max_steps}. Train longer, or give fewer steps to the schedule.",
        )
        for mixer in liza_layers(trained).values():
            mixer.mag.requires_grad_(False)
        follow_schedule(trained, self.schedule, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        follow_schedule(self.model, self.schedule, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        # Without a model of its own it learns of one when training starts; evaluation may be logged before that.
        heads = mag_weights(kwargs["model"] if self.model is None else self.model).values()
        values = [value for row in heads for value in row]
        found = {"mag_weight": sum(values) / len(values)}
        if min(values) != max(values):
            found |= {"mag_weight_min": min(values), "mag_weight_max": max(values)}
        else:
            found["mag_weight"] = values[0]
        # The history already has its own copy of `logs`; callbacks that come later read `logs`.
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry.update(found)

    def _check_model(self, model: nn.Module) -> None:
        layers = liza_layers(model)
        name = type(self).__name__
        require(bool(layers), f"{name}: this model has no LiZA layer and so no μ to set. Make some with titanize.")
        learned = [number for number, mixer in layers.items() if mixer.config.mag == "learned"]
        require(not learned, f'{name}: μ of layer(s) {learned} is learned. Use titanize(..., mag="scheduled").')


class AdjustMaGWeightCallback(MagScheduleCallback):
    """μ rises in a straight line from `initial_weight` to `final_weight` over `transition_step` optimiser steps.

    The name and the arguments are TPTT's; a tuple of one number stands for that number. Otherwise MagScheduleCallback.
    """

    def __init__(
        self,
        model: nn.Module | None,
        initial_weight: float | tuple[float] = 0.01,
        final_weight: float | tuple[float] = 0.5,
        transition_step: int | tuple[int] = 500,
    ):
        values: dict[str, Any] = {"initial": initial_weight, "final": final_weight, "steps": transition_step}
        super().__init__(model, MagSchedule(kind="linear", **values))

    def state(self) -> dict[str, Any]:
        s = self.schedule
        args = {"initial_weight": s.initial, "final_weight": s.final, "transition_step": s.steps}
        return {"args": {"model": None, **args}, "attributes": {}}
