"""The weight μ of the linear branches over a run."""

from statistics import fmean
from typing import Any

from fastweight.configs import require
from fastweight.convert.mag import liza_layers, set_mag_weight
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.model import Model


def check_mag(model: Model, schedule: MagSchedule | None, steps: int) -> None:
    """Refuse a schedule that this model or a run of `steps` updates cannot follow."""
    if schedule is None:
        return
    layers = liza_layers(model)
    require(bool(layers), "mag: this model has no liza layer whose weight could follow a schedule. Titanize it first.")
    learned = [block for block, mixer in layers.items() if mixer.config.mag == "learned"]
    require(not learned, f"mag: layers {learned} learn their own weight, a schedule would overwrite it. Leave it out.")
    end = schedule.end(len(layers))
    require(
        end <= steps,
        f"mag: the schedule goes on to step {end}, past the end of the run after {steps} steps. Lower its steps or "
        "stagger, or make more steps.",
    )


class MagFollower:
    """Sets μ of every liza layer to its value for the step to come. Without a schedule it does nothing."""

    def __init__(self, model: Model, schedule: MagSchedule | None):
        self.model, self.schedule = model, schedule
        self.values: dict[int, float] = {}

    def set(self, step: int) -> None:
        """Step number `step` (0, 1, ...) is about to be made; after the last one, the number of steps."""
        if self.schedule is None:
            return
        layers = list(liza_layers(self.model))
        wanted = {block: self.schedule.at(step, rank, len(layers)) for rank, block in enumerate(layers)}
        # A write makes a GPU fetch the numbers anew.
        changed = {block: value for block, value in wanted.items() if self.values.get(block) != value}
        if changed:
            set_mag_weight(self.model, changed)
        self.values = wanted

    def describe(self) -> dict[str, Any]:
        """For the metrics: the mean over layers, and the weight of each by block."""
        if not self.values:
            return {}
        return {"mag_weight": fmean(self.values.values()), "mag_weights": {str(b): v for b, v in self.values.items()}}
