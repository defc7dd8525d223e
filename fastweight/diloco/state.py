"""The syncer's whole state: a function of the initial weights, the log, and the accepted pushes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.diloco.bases import coded_change
from fastweight.diloco.codecs import Encoded
from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.ledger import MERGE, Entry, Ledger, Push
from fastweight.diloco.log import Log, Snapshot, read_snapshot
from fastweight.diloco.outer import Fragment
from fastweight.diloco.storage import Storage

# The pseudo-gradient of an accepted push.
Gradients = Callable[[Push], Tensor]


class Merged(NamedTuple):
    """What a merge has to be told to the workers: version `version` of `fragment`, coded as a change."""

    fragment: int
    version: int
    change: Encoded


class State:
    """Ledger and weights. `apply` is the only way to change it."""

    def __init__(self, config: DilocoConfig, ledger: Ledger, fragments: list[Fragment]):
        self.config, self.ledger, self.fragments = config, ledger, fragments

    @staticmethod
    def new(config: DilocoConfig, initial: list[Tensor], total: int, batch_size: int) -> "State":
        """The state before the first entry. initial: a vector per fragment."""
        ledger = Ledger(total, batch_size, config.max_rejects, [0] * len(initial))
        return State(config, ledger, [Fragment(weights) for weights in initial])

    def apply(self, entry: Entry, gradients: Gradients) -> Merged | None:
        """Take over a log entry; for a merge, move the weights and return what the workers are to be told."""
        if entry["kind"] != MERGE:
            self.ledger.apply(entry)
            return None
        pushes = [self.ledger.pushes[str(lease)] for lease in entry["leases"]]
        gradient = self._merged(pushes, entry["fragment"], gradients)
        self.ledger.apply(entry)
        fragment = self.fragments[entry["fragment"]]
        fragment.update(gradient, self.config.outer)
        change, fragment.shadow = coded_change(self.config.down, fragment.weights, fragment.shadow)
        return Merged(entry["fragment"], fragment.merges, change)

    def _merged(self, pushes: list[Push], fragment: int, gradients: Gradients) -> Tensor:
        """Σ tokens · factor(age) · gradient / Σ tokens. An old push counts less, and nothing takes its place."""
        total = sum(push.tokens for push in pushes)
        merged = torch.zeros_like(self.fragments[fragment].weights)
        for push in pushes:
            age = self.ledger.versions[fragment] - push.version
            merged.add_(gradients(push), alpha=push.tokens / total * self.config.age_factor(age))
        return merged

    def snapshot(self, log: Log) -> Snapshot:
        """This state as it is after the last entry of `log`."""
        record = {"ledger": self.ledger.to_dict(), "merges": [fragment.merges for fragment in self.fragments]}
        tensors = {f"{i}|{name}": t for i, f in enumerate(self.fragments) for name, t in f.tensors().items()}
        return Snapshot(log.number, log.last, record, tensors)

    @staticmethod
    def from_snapshot(config: DilocoConfig, snapshot: Snapshot) -> "State":
        """The state that `snapshot` was taken of."""
        fragments = []
        for i, merges in enumerate(snapshot.record["merges"]):
            fragment = Fragment(snapshot.tensors[f"{i}|weights"])
            for name in fragment.tensors():
                setattr(fragment, name, snapshot.tensors[f"{i}|{name}"])
            fragment.merges = merges
            fragments.append(fragment)
        return State(config, Ledger.from_dict(snapshot.record["ledger"]), fragments)


def restore(
    storage: Storage, config: DilocoConfig, gradients: Gradients, told: Callable[[State, Merged], None]
) -> tuple[State, Log]:
    """The newest snapshot and all log entries after it. told: called after each merge that is done again."""
    snapshot = read_snapshot(storage)
    state, log = State.from_snapshot(config, snapshot), Log(storage, snapshot.number, snapshot.last)
    for entry in log.entries():
        merged = state.apply(entry, gradients)
        if merged is not None:
            told(state, merged)
    return state, log
