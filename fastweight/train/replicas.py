"""A run among replica groups that come and go: what the loop asks of them, and a run that asks nobody."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.team import Team
from fastweight.train.config import TrainConfig
from fastweight.train.source import shares
from fastweight.train.tally import Tally


class Alone:
    """No other groups: what this one has is all there is."""

    def begin(self) -> tuple[int, int]:
        """(rank, size): which of how many equal slices of the next step this group reads."""
        return 0, 1

    def sum(self, values: tuple[int, ...]) -> list[int]:
        """Whole numbers, summed over the groups."""
        return list(values)

    def add(self, total: Tensor, gradients: list[Tensor]) -> Tensor:
        """`total` summed over the groups, and the gradients in their place."""
        return total

    def agreed(self) -> bool:
        """Whether the step counts; if not, it is to be made again."""
        return True

    def lost_seconds(self) -> float | None:
        """After a step that counts: seconds since the begin of the first that did not, None if there was none.

        Waiting for other groups to start, before any step has counted, is not among them.
        """
        return None

    def close(self) -> None:
        """Leave."""


class Replicas(Alone):
    """The groups that are there, settled anew for every step."""

    def __init__(self, config: ReplicaConfig, trainer: Any):
        from fastweight.distributed.replicas import Quorum

        self._quorum = Quorum(config, partial(_whole, trainer), partial(_take_over, trainer), trainer.tally.step)
        self._began = 0.0
        self._met = False
        self._failed: float | None = None

    def begin(self) -> tuple[int, int]:
        self._began = time.monotonic()
        return self._quorum.begin()

    def sum(self, values: tuple[int, ...]) -> list[int]:
        total = torch.tensor(values, dtype=torch.int64)
        self._quorum.add(total)
        return total.tolist()

    def add(self, total: Tensor, gradients: list[Tensor]) -> Tensor:
        total = total.clone()
        for tensor in (total, *gradients):
            self._quorum.add(tensor)
        return total

    def agreed(self) -> bool:
        agreed = self._quorum.agreed()
        if not agreed and self._met and self._failed is None:
            self._failed = self._began
        self._met |= agreed
        return agreed

    def lost_seconds(self) -> float | None:
        began, self._failed = self._failed, None
        return None if began is None else time.monotonic() - began

    def close(self) -> None:
        self._quorum.close()


def check_replicas(config: TrainConfig, team: Team) -> None:
    """Refuse what groups that come and go cannot do."""
    most = config.replicas.most
    if not most:
        return
    require(team.size == 1, f"replicas: a group is one process, torchrun has started {team.size}. Start each alone.")
    require(not config.carry_state, "replicas: carried memories cannot move between groups. Leave carry_state out.")
    require(not config.max_seconds, "replicas: the clocks of groups differ. Set steps, not max_seconds.")
    require(not config.partial, "replicas: a part of a model cannot be trained by groups. Set trainable to all.")
    for size in range(1, most + 1):
        shares(config.data, size)


def _whole(trainer: Any) -> dict[str, Any]:
    """What another group needs to go on from here."""
    return {"tensors": trainer.tensors(), "tally": trainer.tally.to_dict()}


def _take_over(trainer: Any, state: dict[str, Any]) -> None:
    """Go on from what `_whole` says of another group."""
    tensors = state["tensors"]
    for name, tensor in _under("model", tensors).items():
        trainer.model.get_parameter(name).data.copy_(tensor)
    trainer.optimizer.load_state_tensors(_under("optimizer", tensors))
    if trainer.average is not None:
        trainer.average.load_state_tensors(_under("averaged", tensors))
    vars(trainer.tally).update(vars(Tally.from_dict(state["tally"])))
    trainer.report.say(f"took over the weights of another group after step {trainer.tally.step}")


def _under(word: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named "word:NAME", by NAME."""
    return {name.removeprefix(f"{word}:"): tensor for name, tensor in tensors.items() if name.startswith(f"{word}:")}
