"""The syncer's memory: an append-only log of entries, each with the checksum of the one before, and snapshots.

log/NNNNNNNN.json is entry N. It is created, never written over, so of two syncers one fails at its next entry.
state/NNNNNNNN.json and .safetensors: the whole state after entry N. The state is a function of the log and of the
accepted pushes; a snapshot saves the time to compute it again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fastweight.configs import require
from fastweight.diloco.ledger import Entry
from fastweight.diloco.seals import digest, from_bytes, pack, to_bytes, unpack
from fastweight.diloco.storage import Storage

FOLDER, SNAPSHOTS, KEPT_SNAPSHOTS = "log", "state", 2


class OccupiedError(OSError):
    """Another process does this work: there is one syncer per folder, and one process per worker's name."""


class Snapshot(NamedTuple):
    """The state after log entry `number`, whose checksum is `last`."""

    number: int
    last: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]


class Log:
    """The entries after `number`, for reading and appending. last: checksum of entry `number`."""

    def __init__(self, storage: Storage, number: int, last: str):
        self.storage, self.number, self.last = storage, number, last

    def entries(self) -> Iterator[Entry]:
        """Read the entries that follow, in order, and stand behind them. Raises ValueError for a damaged one."""
        while (data := self.storage.read_if_there(self._name(self.number + 1))) is not None:
            name = self._name(self.number + 1)
            record = from_bytes(data, f"{self.storage.url}: {name}")
            seal = record.pop("sha256", None)
            follows = record.get("number") == self.number + 1 and record.get("previous") == self.last
            require(
                follows and seal == digest(to_bytes(record)),
                f"{self.storage.url}: {name} was changed, or does not follow the entry before it. Restore it.",
            )
            self.number, self.last = self.number + 1, digest(data)
            yield record["entry"]

    def append(self, entry: Entry, owner: str) -> None:
        """Write the next entry for good. Raises OccupiedError if another syncer has written it."""
        record = {"number": self.number + 1, "previous": self.last, "owner": owner, "entry": entry}
        name, data = self._name(self.number + 1), to_bytes(record | {"sha256": digest(to_bytes(record))})
        # The answer to an earlier attempt may have been lost: then the entry is there, and it is this one.
        if not self.storage.create(name, data) and self.storage.read(name) != data:
            raise OccupiedError(f"{self.storage.url}: {name} was written by another syncer. This one ends here.")
        self.number, self.last = self.number + 1, digest(data)

    @staticmethod
    def _name(number: int) -> str:
        return f"{FOLDER}/{number:08d}.json"


def write_snapshot(storage: Storage, snapshot: Snapshot) -> None:
    """Write a snapshot, the tensors first, and remove all but the newest two."""
    data = pack(snapshot.tensors)
    storage.write(f"{SNAPSHOTS}/{snapshot.number:08d}.safetensors", data)
    record = {"last": snapshot.last, "sha256": digest(data), "record": snapshot.record}
    storage.write(f"{SNAPSHOTS}/{snapshot.number:08d}.json", to_bytes(record))
    for number in _numbers(storage)[:-KEPT_SNAPSHOTS]:
        for kind in ("json", "safetensors"):
            storage.remove(f"{SNAPSHOTS}/{number:08d}.{kind}")


def read_snapshot(storage: Storage) -> Snapshot:
    """The newest snapshot that is whole. Raises ValueError if there is none."""
    problems = []
    for number in reversed(_numbers(storage)):
        try:
            return _read_snapshot(storage, number)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    raise ValueError(f"{storage.url}: no whole snapshot in {SNAPSHOTS}/ ({'; '.join(problems) or 'none at all'}).")


def _numbers(storage: Storage) -> list[int]:
    names = (name.removesuffix(".json") for name in storage.names(SNAPSHOTS) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


def _read_snapshot(storage: Storage, number: int) -> Snapshot:
    name = f"{SNAPSHOTS}/{number:08d}"
    record = from_bytes(storage.read(f"{name}.json"), name)
    data = storage.read(f"{name}.safetensors")
    require(digest(data) == record["sha256"], f"{name}.safetensors is not what was written (checksum)")
    return Snapshot(number, record["last"], record["record"], unpack(data, name))
