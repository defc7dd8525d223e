"""A syncer or a worker as a process: the loop around `poll` or `advance`, until the run or the process is to end."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fastweight.configs import require
from fastweight.diloco.learner import Learner
from fastweight.diloco.lock import Lock
from fastweight.diloco.run import Run, open_run, open_store
from fastweight.diloco.state import State, restore
from fastweight.diloco.storage import Storage, StorageError
from fastweight.diloco.syncer import Syncer, read_gradient
from fastweight.model import Model
from fastweight.train.checkpoint import save_model
from fastweight.train.folders import replace_folder
from fastweight.train.signals import stop_requests

Say = Callable[[str], None]


def sync(
    storage: Storage,
    *,
    keys: Mapping[str, bytes] | None = None,
    readmit: Collection[str] = (),
    poll_seconds: float = 1.0,
    lock_seconds: float = 10.0,
    patience_seconds: float = 600.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Be the syncer of the run in `storage` until every sample is counted, or a signal; returns `describe`'s summary.

    Started again after any end, it goes on from what it had written. keys, readmit: as of Syncer. patience_seconds: how
    long the storage may be out of reach. Raises OccupiedError if another syncer is at work, StorageError when the
    patience is at an end.
    """
    run = open_run(storage)
    lock = Lock(storage, seconds=lock_seconds)
    syncer = Syncer(storage, run, lock, keys=keys, readmit=readmit, say=say)
    say(f"syncer of run {run.id}: {run.total_samples:,} samples, from entry {syncer.log.number} of the log on")
    with stop_requests() as stop:
        patience = _Patience(patience_seconds, poll_seconds, say)
        told = False
        while not stop.name and not told:
            finished, decided = syncer.finished, patience.attempt(syncer.poll)
            # A whole look after the end has told every worker.
            told = finished and decided is not None
            if not decided and not told:
                time.sleep(poll_seconds)
    lock.release()
    return describe(run, syncer.state) | {"stopped": stop.name}


def learn(learner: Learner, *, poll_seconds: float = 1.0, patience_seconds: float = 600.0) -> dict[str, Any]:
    """Work until the run is over, or a signal; returns what was done."""
    patience = _Patience(patience_seconds, poll_seconds, learner.say)
    with stop_requests() as stop:
        while not stop.name and not learner.finished:
            if patience.attempt(learner.advance) in (None, "waited"):
                time.sleep(poll_seconds)
    return {
        "worker": learner.name,
        "steps": learner.steps,
        "bytes_read": learner.storage.bytes_read,
        "bytes_written": learner.storage.bytes_written,
        "stopped": stop.name,
    }


class _Patience:
    """Calls again what fails for the storage, for a limited time."""

    def __init__(self, seconds: float, pause: float, say: Say):
        self.seconds, self.pause, self.say, self.failing = seconds, pause, say, 0.0

    def attempt(self, act: Callable[[], Any]) -> Any:
        """What `act` returns, None if the storage failed. Raises StorageError once it has failed for too long."""
        try:
            result = act()
        except StorageError as error:
            now = time.monotonic()
            self.failing = self.failing or now
            if now - self.failing >= self.seconds or error.lasting:
                raise
            self.say(f"{error} Trying again.")
            return None
        self.failing = 0.0
        return result


def read_state(storage: Storage) -> tuple[Run, State]:
    """The run in `storage` and its state now, without writing anything; beside a working syncer too."""
    run = open_run(storage)
    sizes = run.layout_of(run.empty_model()).sizes
    state, _ = restore(
        storage, run.diloco, lambda push: read_gradient(storage, run, push, sizes), lambda state, merged: None
    )
    return run, state


def describe(run: Run, state: State) -> dict[str, Any]:
    """A run in numbers: samples counted, merges, bytes, workers."""
    ledger = state.ledger
    counted = sum(stop - start for start, stop in ledger.counted)
    return {
        "run": run.id,
        "finished": ledger.finished,
        "samples": counted,
        "total_samples": run.total_samples,
        "merges": ledger.merges,
        "leases_taken_back": ledger.voided,
        "push_bytes": ledger.bytes_up,
        "workers": {
            name: worker.refused or ("alive" if worker.alive else "gone") for name, worker in ledger.workers.items()
        },
    }


def merged_model(run: Run, state: State) -> Model:
    """The model with the merged weights of `state`."""
    model = run.empty_model()
    layout = run.layout_of(model)
    for i, fragment in enumerate(state.fragments):
        layout.write(model, i, fragment.weights)
    return model


def export(storage: Storage, out: Path, store: str | Path) -> Run:
    """Write the merged weights as a model folder with the tokenizer of the run's token store."""
    require(not out.exists(), f"{out} exists already. Choose another folder.")
    run, state = read_state(storage)
    tokenizer = open_store(run, store).tokenizer
    replace_folder(out, lambda folder: save_model(folder, merged_model(run, state), tokenizer))
    return run
