"""TPTT's later name for the callback that moves μ."""

from typing import Any

from torch import nn

from fastweight.configs import near_names, require
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.hf import MagScheduleCallback

MODES = ("constant", "gradual", "cyclic", "switch")


class LiZACallback(MagScheduleCallback):
    """MagScheduleCallback by TPTT's modes.

    "constant": final_weight. "gradual": from initial_weight to final_weight over transition_step steps. "cyclic": the
    values of weight_list (or the two weights), one step each. "switch": 0 and final_weight, switch_period steps each.
    A tuple of one number stands for that number.
    """

    def __init__(
        self, model: nn.Module | None, mode: str = "gradual", initial_weight: Any = 0.0, final_weight: Any = 0.5,
        transition_step: Any = 100, weight_list: Any = None, switch_period: int = 1,
    ):  # fmt: skip
        require(mode in MODES, f"LiZACallback: unknown mode {mode!r}.{near_names(str(mode), MODES)}")
        first, last, steps = map(_one, (initial_weight, final_weight, transition_step))
        values = [_one(value) for value in ([first, last] if weight_list is None else weight_list)]
        schedules: dict[str, dict[str, Any]] = {
            "constant": {"kind": "constant", "final": last},
            "gradual": {"kind": "linear", "initial": first, "final": last, "steps": steps},
            "cyclic": {"kind": "cyclic", "values": tuple(values)},
            "switch": {"kind": "cyclic", "values": (0.0, last), "period": switch_period},
        }
        super().__init__(model, MagSchedule(**schedules[mode]))
        self.args = {
            "model": None, "mode": mode, "initial_weight": first, "final_weight": last, "transition_step": steps,
            "weight_list": values, "switch_period": switch_period,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"args": self.args, "attributes": {}}


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
