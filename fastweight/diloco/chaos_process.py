"""The processes of `chaos`, which can be in trouble: they stand still where it is to come, so it never comes elsewhere.

A process that has reached such a point writes its number into a file and waits until that file is gone, or until it is
killed. A worker can besides be slower than it is, and its storage can be out of reach.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from fastweight.diloco.learner import Did, Learner
from fastweight.diloco.processes import learn, sync
from fastweight.diloco.run import open_run, open_store
from fastweight.diloco.storage import Storage, StorageError
from fastweight.files import write_text

POLL_SECONDS = 0.05


class Stops:
    """Where a process stands still. file: says that it does, and where. numbers: of steps or merges, rising."""

    def __init__(self, file: Path, numbers: list[int]):
        self.file, self.numbers = file, numbers

    def reached(self, number: int) -> bool:
        """Whether a process that is at `number` is to stand still."""
        return bool(self.numbers) and number >= self.numbers[0]

    def stand(self, number: int) -> None:
        """Wait until the file is taken away."""
        self.numbers = [later for later in self.numbers if later > number]
        write_text(self.file, str(number))
        while self.file.exists():
            time.sleep(POLL_SECONDS / 5)


class CutStorage(Storage):
    """A storage that is out of reach while the file `cut` exists."""

    def __init__(self, url: str, cut: Path):
        super().__init__(url, attempts=2, wait_seconds=0.1)
        self.cut = cut

    def _try(self, what: str, name: str, act: Any) -> Any:
        if self.cut.exists():
            raise StorageError(f"{self.url}: could not {what} {name}: cut off.")
        return super()._try(what, name, act)


class StoppingStorage(Storage):
    """The syncer's storage: it stands still before merged weights are written, when their merge is in the log."""

    def __init__(self, url: str, stops: Stops):
        super().__init__(url)
        self.stops = stops

    def write(self, name: str, data: bytes) -> None:
        folder, _, version = name.removesuffix(".safetensors").rpartition("/")
        if folder == "base/00" and version.isdecimal() and self.stops.reached(int(version)):
            self.stops.stand(int(version))
        super().write(name, data)


class TroubledLearner(Learner):
    """A worker that needs `slowdown` times as long for its inner steps, and stands still after some of them.

    There its lease is open for certain: the push that ends it has not been written.
    """

    slowdown = 1.0
    stops = Stops(Path(), [])

    def _work(self) -> Did:
        began = time.monotonic()
        did = super()._work()
        if did in ("stepped", "encoded"):
            time.sleep((self.slowdown - 1) * (time.monotonic() - began))
            if self.stops.reached(self.steps):
                self._stand()
        return did

    def _stand(self) -> None:
        """Show what was done, and wait; the time is no part of the next step."""
        self._beat_if_possible()
        began = self.clock()
        self.stops.stand(self.steps)
        self._began += self.clock() - began


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


class Role(NamedTuple):
    """What a process of `chaos` is told, as JSON. store, slowdown: of a worker; a syncer's are empty and 1."""

    name: str
    run: str
    store: str
    slowdown: float
    cut: str
    standing: str
    stops: list[int]


def be_worker(role: Role) -> dict[str, Any]:
    """Work until the run is over."""
    storage = CutStorage(role.run, Path(role.cut))
    run = open_run(storage)
    store = open_store(run, role.store)
    learner = TroubledLearner(storage, run, role.name, store, beat_seconds=0.2, device="cpu", say=say)
    learner.slowdown, learner.stops = role.slowdown, Stops(Path(role.standing), role.stops)
    return learn(learner, poll_seconds=POLL_SECONDS)


def be_syncer(role: Role) -> dict[str, Any]:
    """Merge until every sample is counted."""
    storage = StoppingStorage(role.run, Stops(Path(role.standing), role.stops))
    return sync(storage, poll_seconds=POLL_SECONDS, lock_seconds=1.0, say=say)


if __name__ == "__main__":
    told = Role(**json.loads(sys.argv[1]))
    print(json.dumps(be_worker(told) if told.store else be_syncer(told)))
