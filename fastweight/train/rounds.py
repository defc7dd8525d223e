"""Replica groups that make rounds of steps alone and then bring their weights together (DiLoCo).

A round is to them what a step is to groups that exchange gradients: who is there, and who reads what, is settled at its
begin; it counts as a whole, or is made again from its begin by those that are left. So no sample is lost or doubled.
"""

from typing import Any

import torch
from torch import Tensor

from fastweight.distributed.mesh import ReplicaConfig
from fastweight.train.replicas import OUTER, Alone, Replicas, take, whole
from fastweight.train.tally import Tally

COUNTED = ("pending_targets", "pending_bytes", "pending_count", "bad_steps")


class Rounds(Replicas):
    """The groups that are there, settled anew for every round.

    In round r of `length` = every / fragments steps, fragment r mod fragments is exchanged; in the last round of the
    run all of them, so that all groups end with the same weights.
    """

    def __init__(self, trainer: Any):
        config: ReplicaConfig = trainer.config.replicas
        self.length = config.every // config.fragments
        super().__init__(trainer)
        self.config, self._outer = config, trainer.outer
        self._made, self._end, self._tokens, self._parts = 0, 0, 0, 0
        self._place = (0, 0)
        self._before: dict[str, Any] = {}
        self._names: list[str] = []
        self._moved: list[Tensor] = []
        self._works: list[Any] = []

    @property
    def busy(self) -> bool:
        return self._made > 0

    def begin(self) -> tuple[int, int]:
        if self.busy:
            return self._place
        self._place = super().begin()
        if self._place[1] and not self._is_whole():
            self.vote()
            self._place = (0, 0)
        if self._place[1]:
            self._before, self._tokens = _copy(self.trainer), 0
            self._end = self.trainer.tally.step + self.length
        return self._place

    def sum(self, values: tuple[int, ...]) -> list[int]:
        """Of this group alone, as all that a step of a round needs."""
        return list(values)

    def add(self, total: Tensor, gradients: list[Tensor]) -> Tensor:
        self._parts = total.numel() - 1
        return total

    def agreed(self) -> bool:
        return True

    def settled(self, tokens: int) -> int | None:
        self._made, self._tokens = self._made + 1, self._tokens + tokens
        if self._made == self.length - (0 if self._is_last else self.config.overlap_steps):
            self._start()
        return self._finish() if self._made == self.length else None

    @property
    def _is_last(self) -> bool:
        """Whether the run ends with this round."""
        return self._end == self.trainer.config.steps

    def _is_whole(self) -> bool:
        """Whether a first word with the others arrives: the end of a round is too late to find out that it cannot."""
        self.quorum.sum([])
        return not self.trainer.team.sum([int(self.quorum.failed)])[0]

    def _start(self) -> None:
        """Begin to exchange what is due."""
        fragments = self._outer.fragments
        due = fragments[(self._end // self.length - 1) % len(fragments)]
        self._names = [name for names in fragments for name in names] if self._is_last else due
        self._moved = self._outer.moved(self._names)
        self._works = self.quorum.start(self._moved)

    def _finish(self) -> int | None:
        """The tokens that all groups have read in this round; None if it is to be made again."""
        self._made = 0
        self.quorum.finish(self._works)
        tokens, counted = self._exchange_counts()
        agreed = self.vote()
        if agreed:
            means = [moved / self._place[1] for moved in self._moved]
            self._outer.update(self._names, means, 0.0 if self._is_last else self.config.blend)
            vars(self.trainer.tally).update(counted)
            self.read_tokens += self._tokens
        else:
            take(self.trainer, self._before)
        self._before, self._moved, self._works = {}, [], []
        return tokens if agreed else None

    def _exchange_counts(self) -> tuple[int, dict[str, Any]]:
        """Tokens of the round, and the tally after it, of all groups; anything, if the exchange fails."""
        now, before = self.trainer.tally, Tally.from_dict(self._before["tally"])
        numbers = [getattr(now, name) - getattr(before, name) for name in COUNTED]
        tokens, *numbers = self.quorum.sum([self._tokens, *numbers])
        none = (0.0,) * self._parts
        start = torch.tensor([before.pending_nats, *(before.pending_parts or none)], dtype=torch.float64)
        sums = torch.tensor([now.pending_nats, *(now.pending_parts or none)], dtype=torch.float64) - start
        self.quorum.add([sums])
        nats, *parts = (start + sums).tolist()
        counted = {name: getattr(before, name) + n for name, n in zip(COUNTED, numbers, strict=True)}
        return tokens, counted | {"pending_nats": nats, "pending_parts": tuple(parts)}


def _copy(trainer: Any) -> dict[str, Any]:
    """All that a round changes, as it is now, on the host."""
    state = whole(trainer)
    changing = {name: tensor for name, tensor in state["tensors"].items() if not name.startswith(OUTER)}
    state["tensors"] = {name: tensor.to("cpu", copy=True) for name, tensor in changing.items()}
    return state | {"cut": [name for name in state["cut"] if name in changing]}


def make_groups(trainer: Any) -> Alone:
    """The other groups, as the settings of a run say."""
    config = trainer.config.replicas
    if not config.most:
        return Alone()
    return Rounds(trainer) if config.every else Replicas(trainer)
