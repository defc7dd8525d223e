"""The one authority of a run: gives out leases, takes in pushes, merges them, and writes everything down first.

`poll` looks at the folder once and does what is due. Each decision is a log entry; what follows from it is done after
it is written, and done again if the syncer was killed in between. Only pauses on this process's own clock decide on
grace and on death.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from fastweight.configs import require
from fastweight.diloco.codecs import codec
from fastweight.diloco.ledger import JOIN, LEASE, LEAVE, MERGE, PUSH, REFUSE, REJECT, Entry, Lease, Push, Worker
from fastweight.diloco.lock import Lock
from fastweight.diloco.log import write_snapshot
from fastweight.diloco.messages import (
    WORKERS,
    Beat,
    Order,
    StaleError,
    UnreadableError,
    Wanted,
    check_worker_name,
    decode_push,
    listed_pushes,
    parse_beat,
    raw_beat,
    read_push,
    size_limit,
    write_order,
)
from fastweight.diloco.run import Run
from fastweight.diloco.seals import digest, unpack
from fastweight.diloco.state import Merged, State, restore
from fastweight.diloco.storage import Storage

ACCEPTED = "accepted"


class Syncer:
    """The syncer of `run`, with the lock held.

    keys: worker → key; with them, nobody else takes part. readmit: workers that were refused for faulty pushes and may
    join again, once. Raises OccupiedError if another syncer is at work, ValueError if the folder is damaged or keys are
    missing.
    """

    def __init__(
        self,
        storage: Storage,
        run: Run,
        lock: Lock,
        *,
        keys: Mapping[str, bytes] | None = None,
        readmit: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = lambda line: None,
    ):
        require(not run.signed or keys is not None, "this run has signed pushes: give the file of the workers' keys.")
        self.storage, self.run, self.lock, self.keys, self.clock, self.say = storage, run, lock, keys, clock, say
        self.layout = run.layout_of(run.empty_model())
        self.bases = run.bases(storage, self.layout)
        self._limits = [size_limit(run.diloco.up, size) for size in self.layout.sizes]
        self._gradients: dict[int, Tensor] = {}
        self._merged_before: set[int] = set()
        self._merged: set[int] = set()
        self._beats: dict[str, tuple[bytes, Beat]] = {}
        self._heard: dict[str, tuple[tuple[str, int], float]] = {}
        self._speeds: dict[str, float] = {}
        self._quorum_since: dict[int, float] = {}
        self._answers: dict[str, Order] = {}
        self._seen: set[tuple[str, int, int]] = set()
        # What was decided and is not written, or not done yet, because the storage failed in between.
        self._unwritten: Entry | None = None
        self._undone: Entry | None = None
        self._untold: Merged | None = None
        self.ignored: deque[str] = deque(maxlen=100)
        lock.acquire()
        storage.check_writable("log")
        self.state, self.log = restore(storage, run.diloco, self._gradient, self._tell)
        self._readmit = {name for name in readmit if self.state.ledger.faulty(name)}
        for name in sorted(set(readmit) - self._readmit):
            say(f"readmit: {name} is not refused for faulty pushes")

    @property
    def finished(self) -> bool:
        """Every sample was counted, and the workers were told."""
        return self.state.ledger.finished

    @property
    def due(self) -> float | None:
        """When on this process's clock the first grace time ends; None if none runs."""
        return min((since + self.run.diloco.grace_seconds for since in self._quorum_since.values()), default=None)

    def poll(self) -> bool:
        """Look once, decide, and do. Returns whether anything was decided."""
        before = self.log.number
        self.lock.beat()
        self._carry_out()
        self._hear()
        self._collect()
        for fragment in range(self.run.diloco.fragments):
            self._merge_if_due(fragment)
        self._give_leases()
        self._answer()
        return self.log.number != before

    # What workers show.

    def _hear(self) -> None:
        for worker in self.storage.names(WORKERS):
            try:
                beat = self._latest_beat(worker)
            except ValueError as error:
                self._ignore(f"a beat of {worker}: {error}")
                continue
            if beat is not None:
                self._hear_one(worker, beat)

    def _latest_beat(self, worker: str) -> Beat | None:
        """A worker's sign of life; it is only parsed when it has changed."""
        check_worker_name(worker)
        key, data = self._key(worker), raw_beat(self.storage, worker)
        if data is None:
            return None
        before = self._beats.get(worker)
        if before is None or before[0] != data:
            self._beats[worker] = (data, parse_beat(data, worker, key))
        return self._beats[worker][1]

    def _hear_one(self, worker: str, beat: Beat) -> None:
        now, mark = self.clock(), (beat.incarnation, beat.count)
        before, since = self._heard.get(worker, (None, now))
        moved = before is not None and mark != before
        self._heard[worker] = (mark, now if mark != before else since)
        self._speeds[worker] = beat.seconds_per_step
        known = self.state.ledger.workers.get(worker)
        if known is None or known.incarnation != beat.incarnation or (moved and not known.alive):
            self._admit(worker, beat)
        elif known.alive and now - self._heard[worker][1] >= self.run.diloco.dead_seconds:
            self._decide({"kind": LEAVE, "worker": worker})

    def _admit(self, worker: str, beat: Beat) -> None:
        run = self.run
        wrong = [
            what
            for what, own, needed in (
                ("run", beat.run, run.id),
                ("model", beat.layout, run.layout),
                ("data or tokenizer", beat.data, run.data),
            )
            if own != needed
        ]
        entry: Entry = {"kind": JOIN, "worker": worker, "incarnation": beat.incarnation}
        if wrong:
            entry |= {"kind": REFUSE, "reason": f"the worker has another {' and '.join(wrong)}"}
        elif worker in self._readmit:
            self._readmit.remove(worker)
        elif self.state.ledger.faulty(worker):
            advice = f"Once it is mended, `fastweight diloco sync --readmit {worker}` lets it join"
            entry |= {"kind": REFUSE, "reason": f"its leases ended with faulty pushes before. {advice}"}
        self._decide(entry)

    def _key(self, worker: str) -> bytes | None:
        if self.keys is None:
            return None
        require(worker in self.keys, f"there is no key for worker {worker!r}")
        return self.keys[worker]

    def _ignore(self, what: str) -> None:
        if what not in self.ignored:
            self.ignored.append(what)
            self.say(f"ignored: {what}")

    # Pushes.

    def _collect(self) -> None:
        for worker in sorted(self.state.ledger.workers):
            for number, attempt in listed_pushes(self.storage, worker):
                if (worker, number, attempt) not in self._seen:
                    self._receive(worker, number, attempt)

    def _receive(self, worker: str, number: int, attempt: int) -> None:
        lease = self.state.ledger.leases.get(str(number))
        if lease is None or lease.worker != worker:
            self._seen.add((worker, number, attempt))
            if str(number) not in self.state.ledger.pushes:
                self._ignore(f"a push of {worker} for lease {number}, which it does not hold (late, or sent twice)")
            return
        if attempt == self.state.ledger.workers[worker].again:
            self._decide(self._judged(lease, attempt))
            self._seen.add((worker, number, attempt))

    def _judged(self, lease: Lease, attempt: int) -> Entry:
        """The entry about a push: it is accepted, and the syncer has a copy, or it is rejected."""
        try:
            limit = self._limits[lease.fragment]
            pushed = read_push(self.storage, lease.worker, lease.id, attempt, self._key(lease.worker), limit)
            gradient = decode_push(pushed, lease, self._wanted())
        except ValueError as error:
            kinds = {"final": not isinstance(error, UnreadableError), "faulty": not isinstance(error, StaleError)}
            return {"kind": REJECT, "lease": lease.id, "reason": str(error).rstrip("."), **kinds}
        # A copy that no worker can change: merges must be repeatable.
        self.storage.write(_accepted(lease.id), pushed.data)
        self._gradients[lease.id] = gradient
        e = pushed.envelope
        about = {"sha256": e.sha256, "version": e.version, "tokens": e.tokens, "size": e.size, "loss_nats": e.loss_nats}
        return {"kind": PUSH, "lease": lease.id, **about}

    def _wanted(self) -> Wanted:
        run, config, data = self.run, self.run.diloco, self.run.train.data
        # One lease per fragment, and as many again for a worker that was away.
        tokens = 2 * config.fragments * config.lease_steps * data.batch_size * data.seq_len
        versions = self.state.ledger.versions
        return Wanted(run.id, run.layout, config.up, self.layout.sizes, versions, config.max_age, tokens)

    def _gradient(self, push: Push) -> Tensor:
        """The pseudo-gradient of an accepted push; from the folder if this process has not decoded it."""
        number = push.lease.id
        self._merged.add(number)
        if number in self._gradients:
            return self._gradients.pop(number)
        return read_gradient(self.storage, self.run, push, self.layout.sizes)

    # Merges.

    def _merge_if_due(self, fragment: int) -> None:
        ledger, config, now = self.state.ledger, self.run.diloco, self.clock()
        waiting = ledger.waiting(fragment)
        if not waiting:
            self._quorum_since.pop(fragment, None)
            return
        if ledger.expected(fragment):
            if not config.quorum or len(waiting) < config.quorum:
                return
            if now < self._quorum_since.setdefault(fragment, now) + config.grace_seconds:
                return
        self._quorum_since.pop(fragment, None)
        ages = [ledger.versions[fragment] - push.version for push in waiting]
        leases = [push.lease.id for push in waiting]
        self._decide({"kind": MERGE, "fragment": fragment, "leases": leases, "ages": ages})

    def _tell(self, state: State, merged: Merged) -> None:
        held = state.fragments[merged.fragment].shadow
        self.bases.publish(merged.fragment, merged.version, merged.change, held)

    def _save(self) -> None:
        """Write a snapshot, and remove the accepted pushes that neither it nor the one before needs."""
        write_snapshot(self.storage, self.state.snapshot(self.log))
        needed = self._merged | self._merged_before | {int(lease) for lease in self.state.ledger.pushes}
        for name in self.storage.names(ACCEPTED):
            number = name.removesuffix(".safetensors")
            if number.isdecimal() and int(number) not in needed:
                self.storage.remove(f"{ACCEPTED}/{name}")
        self._merged_before, self._merged = self._merged, set()

    # Leases and answers.

    def _give_leases(self) -> None:
        ledger, config = self.state.ledger, self.run.diloco
        active = sorted(name for name, worker in ledger.workers.items() if worker.alive and not worker.refused)
        if ledger.last_lease == 0 and len(active) < config.start_workers:
            return
        for worker in active:
            free = ledger.workers[worker].lease == 0 and (config.overlap_steps or not ledger.holds_push(worker))
            if free and ledger.left:
                first, count = ledger.next_range(self._steps(worker, active))
                lease = {"worker": worker, "id": ledger.last_lease + 1, "first": first, "count": count}
                self._decide({"kind": LEASE, **lease})

    def _steps(self, worker: str, active: list[str]) -> int:
        """The inner steps of the worker's next lease."""
        config = self.run.diloco
        if not config.dylu:
            return config.lease_steps
        own, speeds = self._speeds.get(worker, 0.0), [self._speeds.get(name, 0.0) for name in active]
        fastest = min((seconds for seconds in speeds if seconds > 0), default=0.0)
        if own <= 0:
            return config.min_steps
        return min(config.lease_steps, max(config.min_steps, round(config.lease_steps * fastest / own)))

    def _answer(self) -> None:
        for name, worker in self.state.ledger.workers.items():
            order = self._order(worker)
            if self._answers.get(name) != order:
                write_order(self.storage, name, order)
                self._answers[name] = order

    def _order(self, worker: Worker) -> Order:
        ledger = self.state.ledger
        lease: Lease | None = ledger.leases.get(str(worker.lease))
        return Order(
            incarnation=worker.incarnation,
            versions=tuple(ledger.versions),
            lease=lease,
            answered=worker.answered,
            outcome=worker.outcome,
            again=worker.again,
            refused=worker.refused,
            finished=ledger.finished,
        )

    def _decide(self, entry: Entry) -> None:
        """Write an entry, then do what follows from it."""
        self._unwritten = entry
        self._carry_out()

    def _carry_out(self) -> None:
        """Do what was decided, from where the storage failed."""
        if self._unwritten is not None:
            self.log.append(self._unwritten, self.lock.owner)
            self._undone, self._unwritten = self._unwritten, None
        if self._undone is not None:
            self._untold = self.state.apply(self._undone, self._gradient)
            self.say(_describe(self._undone))
            self._undone = None
        if self._untold is not None:
            self._tell(self.state, self._untold)
            self._untold = None
            if self.state.ledger.merges % self.run.diloco.snapshot_every == 0 or self.state.ledger.finished:
                self._save()


def read_gradient(storage: Storage, run: Run, push: Push, sizes: list[int]) -> Tensor:
    """The pseudo-gradient of an accepted push, from the syncer's copy. Raises ValueError if the copy is damaged."""
    name = _accepted(push.lease.id)
    data = storage.read(name)
    require(digest(data) == push.sha256, f"{storage.url}: {name} is damaged (checksum). Restore it from a copy.")
    return codec(run.diloco.up).decode(unpack(data, name), sizes[push.lease.fragment])


def _accepted(lease: int) -> str:
    return f"{ACCEPTED}/{lease:08d}.safetensors"


def _describe(entry: Entry) -> str:
    details = ", ".join(f"{name} {value}" for name, value in entry.items() if name not in ("kind", "sha256"))
    return f"{entry['kind']}: {details}"
