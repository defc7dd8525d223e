"""A worker with troubles, for `chaos`: it can be slower than it is, and its storage can be out of reach."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from fastweight.diloco.learner import Did, Learner
from fastweight.diloco.processes import learn
from fastweight.diloco.run import open_run, open_store
from fastweight.diloco.storage import Storage, StorageError


class CutStorage(Storage):
    """A storage that is out of reach while the file `cut` exists."""

    def __init__(self, url: str, cut: Path):
        super().__init__(url, attempts=2, wait_seconds=0.1)
        self.cut = cut

    def _try(self, what: str, name: str, act: Any) -> Any:
        if self.cut.exists():
            raise StorageError(f"{self.url}: could not {what} {name}: cut off.")
        return super()._try(what, name, act)


class SlowLearner(Learner):
    """A worker that needs `slowdown` times as long for its inner steps."""

    slowdown = 1.0

    def _work(self) -> Did:
        began = time.monotonic()
        did = super()._work()
        if did in ("stepped", "encoded"):
            time.sleep((self.slowdown - 1) * (time.monotonic() - began))
        return did


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)


def main(folder: str, store: str, name: str, slowdown: str, cut: str) -> None:
    """Work until the run is over."""
    storage = CutStorage(folder, Path(cut))
    run = open_run(storage)
    learner = SlowLearner(storage, run, name, open_store(run, store), beat_seconds=0.2, device="cpu", say=say)
    learner.slowdown = float(slowdown)
    print(json.dumps(learn(learner, poll_seconds=0.05)))


if __name__ == "__main__":
    main(*sys.argv[1:])
