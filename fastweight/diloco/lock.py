"""One syncer per folder: a lock with an owner and a heartbeat that is counted, not timed.

Who finds a lock watches it on a clock of its own: if the count moves, the owner lives. Clocks of two machines are
never compared. The lock keeps a second syncer from starting; what keeps a frozen first one from going on is the log.
"""

import secrets
import time
from collections.abc import Callable
from typing import Any

from fastweight.configs import require
from fastweight.diloco.log import OccupiedError
from fastweight.diloco.seals import from_bytes, to_bytes
from fastweight.diloco.storage import Storage

NAME = "lock.json"


class Lock:
    """The lock of one syncer process. seconds: a lock whose count stood still for so long is taken over."""

    def __init__(
        self,
        storage: Storage,
        *,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        require(seconds > 0, f"lock: seconds must be positive, got {seconds}.")
        self.storage, self.seconds, self.clock, self.sleep = storage, seconds, clock, sleep
        self.owner, self._count, self._beaten = secrets.token_hex(8), 0, 0.0

    def acquire(self) -> None:
        """Take the lock. Raises OccupiedError if another syncer shows that it lives."""
        found = self._read()
        if found is not None and not found.get("released"):
            self._watch(found)
        self._write()
        # Two may have written at the same moment: both look again after a while, the last one to write stays.
        if found is not None:
            self.sleep(self.seconds / 10)
        self._check()

    def beat(self) -> None:
        """Show that this syncer lives, a few times in `seconds`. Raises OccupiedError if the lock has gone."""
        if self.clock() - self._beaten >= self.seconds / 5:
            self._check()
            self._write()

    def release(self) -> None:
        """Give the lock back, if it is still this syncer's."""
        found = self._read()
        if found is not None and found.get("owner") == self.owner:
            self._write(released=True)

    def _watch(self, found: dict[str, Any]) -> None:
        began = self.clock()
        while self.clock() - began < self.seconds:
            self.sleep(self.seconds / 20)
            now = self._read()
            if now is None or now.get("released"):
                return
            if (now.get("owner"), now.get("count")) != (found.get("owner"), found.get("count")):
                raise OccupiedError(
                    f"{self.storage.url}: another syncer ({now.get('owner')}) works here. Stop it first; there is one "
                    "syncer per folder."
                )

    def _check(self) -> None:
        found = self._read()
        if found is None or found.get("owner") != self.owner:
            owner = "nobody" if found is None else found.get("owner")
            raise OccupiedError(f"{self.storage.url}: the lock was taken over by {owner}. This syncer ends here.")

    def _read(self) -> dict[str, Any] | None:
        data = self.storage.read_if_there(NAME)
        return None if data is None else from_bytes(data, f"{self.storage.url}: {NAME}")

    def _write(self, *, released: bool = False) -> None:
        self._count, self._beaten = self._count + 1, self.clock()
        self.storage.write(NAME, to_bytes({"owner": self.owner, "count": self._count, "released": released}))
