"""A run among replica groups that come and go: what the loop asks of them, and a run that asks nobody."""

import hashlib
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require, to_json
from fastweight.distributed.copies import cut_as
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.team import Team
from fastweight.optim.cut import cut_of, local
from fastweight.train.config import TrainConfig
from fastweight.train.shaping import fingerprint, shaping_settings
from fastweight.train.source import shares
from fastweight.train.tally import Tally


class Alone:
    """No other groups: what this one has is all there is."""

    def begin(self) -> tuple[int, int]:
        """(rank, size): which of how many equal slices of the next step this group reads; of 0: too few are there."""
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

    def __init__(self, trainer: Any):
        from fastweight.distributed.replicas import Quorum

        config: ReplicaConfig = trainer.config.replicas
        whole, load = partial(_whole, trainer), partial(_take_over, trainer)
        first = lambda: trainer.tensors().values()  # noqa: E731
        self._quorum = Quorum(config, trainer.team, _word(trainer), whole, load, first, trainer.tally.step)
        self._least = config.least
        self._began = 0.0
        self._met = False
        self._failed: float | None = None

    def begin(self) -> tuple[int, int]:
        self._began = time.monotonic()
        rank, size = self._quorum.begin()
        if size >= self._least:
            return rank, size
        self.agreed()
        return 0, 0

    def sum(self, values: tuple[int, ...]) -> list[int]:
        return self._quorum.sum(values)

    def add(self, total: Tensor, gradients: list[Tensor]) -> Tensor:
        total = total.clone()
        self._quorum.add([total, *map(local, gradients)])
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
    slow, patient = config.replicas.timeout_seconds, config.mesh.timeout_seconds
    require(
        team.size == 1 or slow < patient,
        f"replicas: timeout_seconds ({slow}) must be below mesh.timeout_seconds ({patient}): while one process of a group "
        "waits for another group, the others of its own wait for it.",
    )
    require(not config.carry_state, "replicas: carried memories cannot move between groups. Leave carry_state out.")
    require(not config.max_seconds, "replicas: the clocks of groups differ. Set steps, not max_seconds.")
    require(not config.partial, "replicas: a part of a model cannot be trained by groups. Set trainable to all.")
    for size in range(1, most + 1):
        shares(config.data, size * team.readers)


def _word(trainer: Any) -> int:
    """A number below 2^20 that says what all groups must have alike."""
    config = trainer.config
    settings = {name: value for name, value in shaping_settings(config).items() if name != "model"}
    settings |= {"layers": trainer.model.config.to_dict(), "data read": fingerprint(trainer.store, config)}
    settings["mesh"] = [*config.mesh.sizes(trainer.team.size), config.mesh.context]
    return int(hashlib.sha256(to_json(settings).encode()).hexdigest()[:5], 16)


def _whole(trainer: Any) -> dict[str, Any]:
    """What the same process of another group needs to go on from here: its rows of what is cut, all of the rest."""
    tensors = trainer.tensors()
    return {
        "tensors": {name: local(tensor.detach()) for name, tensor in tensors.items()},
        "cut": [name for name, tensor in tensors.items() if cut_of(tensor) is not None],
        "tally": trainer.tally.to_dict(),
    }


@torch.no_grad()
def _take_over(trainer: Any, state: dict[str, Any]) -> None:
    """Go on from what `_whole` says of another group."""
    tensors, cut = state["tensors"], set(state["cut"])
    for name, tensor in _under("model", tensors).items():
        local(trainer.model.get_parameter(name)).copy_(tensor)
    for name in cut:
        parameter = name.partition(":")[2].partition("|")[0]
        tensors[name] = cut_as(trainer.model.get_parameter(parameter), tensors[name])
    trainer.optimizer.load_state_tensors(_under("optimizer", tensors))
    if trainer.average is not None:
        trainer.average.load_state_tensors(_under("averaged", tensors))
    vars(trainer.tally).update(vars(Tally.from_dict(state["tally"])))
    trainer.report.say(f"took over the weights of another group after step {trainer.tally.step}")


def _under(word: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named "word:NAME", by NAME."""
    return {name.removeprefix(f"{word}:"): tensor for name, tensor in tensors.items() if name.startswith(f"{word}:")}
