"""Who works on which samples: the part of the syncer's state that is not tensors, changed by log entries alone.

A sample is in exactly one place: not yet given out, in a lease, in an accepted push, or counted in a merge.
"""

import dataclasses
from bisect import insort
from dataclasses import dataclass, field
from typing import Any

from fastweight.configs import from_nested, require

Entry = dict[str, Any]
JOIN, REFUSE, LEAVE, LEASE, PUSH, REJECT, MERGE = "join", "refuse", "leave", "lease", "push", "reject", "merge"


@dataclass(frozen=True)
class Lease:
    """Samples first .. first + count, for one worker; it then pushes `fragment`."""

    id: int
    worker: str
    incarnation: str
    first: int
    count: int
    fragment: int


@dataclass(frozen=True)
class Push:
    """An accepted push that waits for its merge. version: merges of its fragment that it started from."""

    lease: Lease
    sha256: str
    version: int
    tokens: int
    size: int


@dataclass
class Worker:
    """What the syncer knows of a worker.

    incarnation: names the process; a restarted worker has another. turn: the fragment that its next lease is for.
    lease: the open one, 0 for none. answered, outcome: its last lease that was settled, and how. again: faulty uploads
    of the open lease. rejects: leases in a row that ended with a faulty push. refused: why it gets none any more.
    """

    incarnation: str
    turn: int = 0
    alive: bool = True
    lease: int = 0
    answered: int = 0
    outcome: str = ""
    again: int = 0
    rejects: int = 0
    refused: str = ""


@dataclass
class Ledger:
    """All leases, pushes and counts of a run. total: samples of the run. counted: disjoint [start, stop) in order."""

    total: int
    batch_size: int
    max_rejects: int
    versions: list[int]
    next_sample: int = 0
    last_lease: int = 0
    merges: int = 0
    voided: int = 0
    bytes_up: int = 0
    tokens: int = 0
    returned: list[list[int]] = field(default_factory=list)
    counted: list[list[int]] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)
    leases: dict[str, Lease] = field(default_factory=dict)
    pushes: dict[str, Push] = field(default_factory=dict)

    def apply(self, entry: Entry) -> None:
        """Take over one log entry. Raises ValueError if it does not follow from the entries before it."""
        getattr(self, f"_on_{entry['kind']}")(entry)

    @property
    def finished(self) -> bool:
        """Every sample has been counted."""
        return self.counted == [[0, self.total]]

    @property
    def left(self) -> int:
        """Samples that no lease, push or merge holds."""
        return self.total - self.next_sample + sum(count for _, count in self.returned)

    def next_range(self, steps: int) -> tuple[int, int]:
        """First and count of the samples that a lease of at most `steps` steps would get; returned ones come first."""
        wanted = steps * self.batch_size
        if self.returned:
            first, count = self.returned[0]
            return first, min(count, wanted)
        return self.next_sample, min(self.total - self.next_sample, wanted)

    def waiting(self, fragment: int) -> list[Push]:
        """Accepted pushes of a fragment, by their first sample."""
        return sorted((p for p in self.pushes.values() if p.lease.fragment == fragment), key=lambda p: p.lease.first)

    def expected(self, fragment: int) -> list[Lease]:
        """Open leases of a fragment whose workers have no push of it waiting."""
        there = {push.lease.worker for push in self.waiting(fragment)}
        return [x for x in self.leases.values() if x.fragment == fragment and x.worker not in there]

    def faulty(self, worker: str) -> bool:
        """Whether this worker was refused for its pushes, and has not joined since."""
        return worker in self.workers and self.workers[worker].rejects >= self.max_rejects

    def holds_push(self, worker: str) -> bool:
        """Whether a push of this worker waits for its merge."""
        return any(push.lease.worker == worker for push in self.pushes.values())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Ledger":
        """Read what `to_dict` returned."""
        ledger: Ledger = from_nested(Ledger, data | {"workers": {}, "leases": {}, "pushes": {}}, "ledger")
        ledger.versions = list(data["versions"])
        ledger.returned, ledger.counted = ([list(pair) for pair in data[name]] for name in ("returned", "counted"))
        ledger.workers = {name: from_nested(Worker, w, "worker") for name, w in data["workers"].items()}
        ledger.leases = {key: from_nested(Lease, x, "lease") for key, x in data["leases"].items()}
        ledger.pushes = {key: from_nested(Push, x, "push") for key, x in data["pushes"].items()}
        return ledger

    def _on_join(self, entry: Entry) -> None:
        name, known = entry["worker"], self.workers.get(entry["worker"])
        if known is None:
            self.workers[name] = Worker(entry["incarnation"], turn=self.merges % len(self.versions))
            return
        if known.lease:
            self._void(known.lease, "the worker was restarted")
        known.incarnation, known.alive, known.turn = entry["incarnation"], True, self.merges % len(self.versions)
        known.again = known.rejects = 0
        known.refused = ""

    def _on_refuse(self, entry: Entry) -> None:
        worker = self.workers.setdefault(entry["worker"], Worker(entry["incarnation"]))
        if worker.lease:
            self._void(worker.lease, entry["reason"])
        worker.incarnation, worker.alive, worker.refused = entry["incarnation"], True, entry["reason"]

    def _on_leave(self, entry: Entry) -> None:
        worker = self.workers[entry["worker"]]
        worker.alive = False
        if worker.lease:
            self._void(worker.lease, "no sign of life from the worker")

    def _on_lease(self, entry: Entry) -> None:
        worker, first, count = self.workers[entry["worker"]], entry["first"], entry["count"]
        require(worker.lease == 0 and entry["id"] == self.last_lease + 1, f"log: lease {entry['id']} is out of turn.")
        if self.returned:
            start, length = self.returned.pop(0)
            require(start == first and count <= length, f"log: lease {entry['id']} is not of the returned samples.")
            if count < length:
                self.returned.insert(0, [start + count, length - count])
        else:
            require(first == self.next_sample, f"log: lease {entry['id']} does not start at the next sample.")
            self.next_sample += count
        self.last_lease = entry["id"]
        lease = Lease(entry["id"], entry["worker"], worker.incarnation, first, count, worker.turn)
        self.leases[str(lease.id)], worker.lease = lease, lease.id
        worker.turn = (worker.turn + 1) % len(self.versions)

    def _on_push(self, entry: Entry) -> None:
        lease = self.leases.pop(str(entry["lease"]))
        details = {name: entry[name] for name in ("sha256", "version", "tokens", "size")}
        self.pushes[str(lease.id)] = Push(lease, **details)
        worker = self.workers[lease.worker]
        worker.lease = worker.again = worker.rejects = 0
        self.bytes_up += entry["size"]

    def _on_reject(self, entry: Entry) -> None:
        lease = self.leases[str(entry["lease"])]
        worker = self.workers[lease.worker]
        if entry["final"] or worker.again + 1 >= self.max_rejects:
            worker.rejects += entry["faulty"]
            self._void(lease.id, entry["reason"])
        else:
            worker.again += 1
        if worker.rejects >= self.max_rejects:
            worker.refused = f"{worker.rejects} leases in a row ended with a faulty push, the last: {entry['reason']}"

    def _on_merge(self, entry: Entry) -> None:
        for key in map(str, entry["leases"]):
            push = self.pushes.pop(key)
            self._count(push.lease)
            self.tokens += push.tokens
            self._settle(push.lease, "merged")
        self.versions[entry["fragment"]] += 1
        self.merges += 1

    def _void(self, lease_id: int, reason: str) -> None:
        """Take a lease back; its samples are given out again."""
        lease = self.leases.pop(str(lease_id))
        insort(self.returned, [lease.first, lease.count])
        self.voided += 1
        worker = self.workers[lease.worker]
        worker.lease = worker.again = 0
        self._settle(lease, reason)

    def _settle(self, lease: Lease, outcome: str) -> None:
        worker = self.workers[lease.worker]
        if lease.id > worker.answered:
            worker.answered, worker.outcome = lease.id, outcome

    def _count(self, lease: Lease) -> None:
        """Add a lease's samples to those counted. Raises ValueError if one of them was counted before."""
        start, stop = lease.first, lease.first + lease.count
        clash = any(a < stop and start < b for a, b in self.counted)
        require(not clash, f"samples {start}..{stop} were counted before. The log is damaged; restore it from a copy.")
        insort(self.counted, [start, stop])
        joined: list[list[int]] = []
        for a, b in self.counted:
            if joined and joined[-1][1] == a:
                joined[-1][1] = b
            else:
                joined.append([a, b])
        self.counted = joined
