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

# Between two looks whether enough groups have come.
PAUSE_SECONDS = 0.2
# In names of a checkpoint's tensors: of what groups agree on that train alone for a while.
OUTER = "outer:"


class Alone:
    """No other groups: what this one has is all there is.

    length: steps that count together. busy: whether some of them are made, but not all.
    """

    length, busy = 1, False

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

    def settled(self, tokens: int) -> int | None:
        """After a step in which all that `sum` knows of read `tokens`: the tokens that count now, of all groups.

        None in the midst of steps that count together, and if they do not: all is then as before the first of them.
        """
        return tokens

    def describe(self) -> dict[str, Any]:
        """What the metrics say of the groups; since the last call, all processes of the team."""
        return {}

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
        state, load = partial(whole, trainer), partial(_take_over, trainer)
        first, count = partial(_tensors, trainer), trainer.tally.step // self.length
        name, word = trainer.out.resolve().name, _word(trainer)
        self.quorum = Quorum(config, trainer.team, name, word, state, load, first, count)
        self.trainer = trainer
        self.read_tokens = 0.0
        self._size, self._least = 0, config.least
        self._began = 0.0
        self._met = False
        self._failed: float | None = None

    def begin(self) -> tuple[int, int]:
        self._began = time.monotonic()
        rank, self._size = self.quorum.begin()
        if self._size >= self._least:
            return rank, self._size
        self.vote()
        time.sleep(PAUSE_SECONDS)
        return 0, 0

    def sum(self, values: tuple[int, ...]) -> list[int]:
        return self.quorum.sum(values)

    def add(self, total: Tensor, gradients: list[Tensor]) -> Tensor:
        total = total.clone()
        self.quorum.add([total, *map(local, gradients)])
        return total

    def agreed(self) -> bool:
        return self.vote()

    def settled(self, tokens: int) -> int | None:
        self.read_tokens += tokens / self._size
        return tokens

    def describe(self) -> dict[str, Any]:
        (sent,) = self.trainer.team.sum([self.quorum.sent_bytes])
        read, self.read_tokens, self.quorum.sent_bytes = self.read_tokens, 0.0, 0
        return {"groups": self._size, "sent_bytes_per_token": sent / max(1.0, read)}

    def vote(self) -> bool:
        """Whether what was exchanged since `begin` counts."""
        agreed = self.quorum.agreed()
        if not agreed and self._met and self._failed is None:
            self._failed = self._began
        self._met |= agreed
        return agreed

    def lost_seconds(self) -> float | None:
        began, self._failed = self._failed, None
        return None if began is None else time.monotonic() - began

    def close(self) -> None:
        self.quorum.close()


def check_replicas(config: TrainConfig, team: Team) -> None:
    """Refuse what groups that come and go cannot do."""
    most = config.replicas.most
    if not most:
        return
    slow, patient = config.replicas.timeout_seconds, config.mesh.timeout_seconds
    require(
        team.size == 1 or slow < patient,
        f"replicas: timeout_seconds ({slow}) must be below mesh.timeout_seconds ({patient}): while one process of a "
        "group waits for another group, the others of its own wait for it.",
    )
    require(not config.carry_state, "replicas: carried memories cannot move between groups. Leave carry_state out.")
    require(not config.max_seconds, "replicas: the clocks of groups differ. Set steps, not max_seconds.")
    _check_rounds(config)
    require(not config.partial, "replicas: a part of a model cannot be trained by groups. Set trainable to all.")
    for size in range(1, most + 1):
        shares(config.data, size * team.readers)


def _check_rounds(config: TrainConfig) -> None:
    """Refuse what groups that train alone for a while cannot do."""
    every, fragments = config.replicas.every, config.replicas.fragments
    if not every:
        return
    length = every // fragments
    require(
        config.steps % length == 0,
        f"replicas: a run of {config.steps} steps does not end with a round of {length} (every / fragments). Set steps "
        f"to a multiple of {length}.",
    )
    require(
        config.averaging.kind == "none",
        "replicas: with every, weights between exchanges differ from group to group, and so would their average. Set "
        "averaging.kind to none.",
    )


def _word(trainer: Any) -> int:
    """A number below 2^20 that says what all groups must have alike."""
    config = trainer.config
    settings = {name: value for name, value in shaping_settings(config).items() if name != "model"}
    settings |= {"layers": trainer.model.config.to_dict(), "data read": fingerprint(trainer.store, config)}
    settings["mesh"] = [*config.mesh.sizes(trainer.team.size), config.mesh.context]
    return int(hashlib.sha256(to_json(settings).encode()).hexdigest()[:5], 16)


def _tensors(trainer: Any) -> list[Tensor]:
    return list(trainer.tensors().values())


def whole(trainer: Any) -> dict[str, Any]:
    """What the same process of another group needs to go on from here: its rows of what is cut, all of the rest."""
    tensors = trainer.tensors()
    return {
        "tensors": {name: local(tensor.detach()) for name, tensor in tensors.items()},
        "cut": [name for name, tensor in tensors.items() if cut_of(tensor) is not None],
        "tally": trainer.tally.to_dict(),
    }


def _take_over(trainer: Any, state: dict[str, Any]) -> None:
    """Go on from what `whole` says of another group."""
    take(trainer, state)
    trainer.report.say(f"took over the weights of another group after step {trainer.tally.step}")


@torch.no_grad()
def take(trainer: Any, state: dict[str, Any]) -> None:
    """Become what `whole` said; what it has nothing of stays as it is."""
    tensors = dict(state["tensors"])
    for name, tensor in _under("model", tensors).items():
        local(trainer.model.get_parameter(name)).copy_(tensor)
    for name in state["cut"]:
        parameter = name.partition(":")[2].partition("|")[0]
        tensors[name] = cut_as(trainer.model.get_parameter(parameter), tensors[name])
    trainer.optimizer.load_state_tensors(_under("optimizer", tensors))
    for word, part in (("averaged", trainer.average), ("outer", trainer.outer)):
        if part is not None and (found := _under(word, tensors)):
            part.load_state_tensors(found)
    vars(trainer.tally).update(vars(Tally.from_dict(state["tally"])))


def _under(word: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named "word:NAME", by NAME."""
    return {name.removeprefix(f"{word}:"): tensor for name, tensor in tensors.items() if name.startswith(f"{word}:")}
