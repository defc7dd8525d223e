"""A worker: takes a lease, makes its inner steps, pushes what it has learned, takes over what was merged.

`advance` does one thing at a time, so that a real process and the simulator drive the same code. All that a worker
sends, it writes into the folder; nothing ever connects to it.
"""

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.data import Store
from fastweight.devices import pick_device
from fastweight.diloco.codecs import Feedback
from fastweight.diloco.inner import Inner
from fastweight.diloco.ledger import Lease
from fastweight.diloco.log import OccupiedError
from fastweight.diloco.messages import (
    ORDERS,
    WORKERS,
    Beat,
    Envelope,
    Order,
    Outgoing,
    check_worker_name,
    read_order,
    write_beat,
    write_push,
)
from fastweight.diloco.run import Run, data_fingerprint
from fastweight.diloco.seals import digest, pack
from fastweight.diloco.storage import Storage, StorageError

Did = Literal["waited", "fetched", "stepped", "encoded", "pushed", "finished"]


class Learner:
    """One worker of a run. `phase`: idle, working (in a lease), ready (a push is to be written).

    key: signs what it writes. beat_seconds: between signs of life, also while weights are moved; 0: before everything
    that it does, and not meanwhile. incarnation: names this process.
    """

    def __init__(
        self,
        storage: Storage,
        run: Run,
        name: str,
        store: Store,
        *,
        key: bytes | None = None,
        clock: Callable[[], float] = time.monotonic,
        beat_seconds: float = 2.0,
        incarnation: str | None = None,
        device: str = "auto",
        say: Callable[[str], None] = lambda line: None,
    ):
        check_worker_name(name)
        require(not run.signed or key is not None, "this run has signed pushes: give the file of this worker's key.")
        self.storage, self.run, self.name, self.key = storage, run, name, key
        self.clock, self.beat_seconds, self.say = clock, beat_seconds, say
        self.incarnation = incarnation or secrets.token_hex(8)
        self.data = data_fingerprint(store, run.train.data)
        model = run.empty_model().to(pick_device(device))
        self.layout = run.layout_of(model)
        self.inner = Inner(model, store, run.train)
        self.bases = run.bases(storage, self.layout)
        self.feedback = [Feedback(run.diloco.up, run.diloco.error_decay) for _ in self.layout.sizes]
        self.anchors: list[Tensor] = []
        self.versions = [-1] * len(self.layout.sizes)
        self.tokens = [0] * len(self.layout.sizes)
        self.phase = "idle"
        self.lease: Lease | None = None
        self.outgoing: Outgoing | None = None
        self.finished = False
        self.seconds_per_step, self.steps = 0.0, 0
        self._done, self._last_lease, self._sum, self._targets = 0, 0, 0.0, 0
        # The push whose merge has not been taken over yet.
        self._awaited: Lease | None = None
        self._known = False
        self._beats, self._beaten, self._began = 0, -math.inf, 0.0

    def advance(self) -> Did:
        """Do the next thing and say what it was. Raises StorageError when the folder cannot be reached; call again.

        Raises OccupiedError if another process has taken this worker's name, ValueError if the syncer refuses it.
        """
        if self.finished:
            return "finished"
        if self.clock() - self._beaten >= self.beat_seconds:
            self._beat_if_possible()
            if self.phase == "working":
                self._look()
        if self.phase == "ready":
            return self._push()
        if self.phase == "working":
            return self._work()
        return self._idle()

    @property
    def at_work(self) -> bool:
        """Whether the next thing to do is an inner step, not a look at the folder."""
        return self.phase == "working" and not self._blocked()

    def beat(self) -> None:
        """Show that this worker lives."""
        self._beats += 1
        run = self.run
        beat = Beat(
            worker=self.name,
            incarnation=self.incarnation,
            count=self._beats,
            run=run.id,
            layout=self.layout.digest,
            data=self.data,
            seconds_per_step=self.seconds_per_step,
            steps=self.steps,
            bytes_read=self.storage.bytes_read,
            bytes_written=self.storage.bytes_written,
        )
        write_beat(self.storage, beat, self.key)
        self._beaten = self.clock()

    def _beat_if_possible(self) -> None:
        """A worker that is cut off goes on with its lease."""
        try:
            self.beat()
        except StorageError as error:
            self.say(f"no sign of life could be given: {error}")
            self._beaten = self.clock()

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Inside, signs of life go on: to move weights may take longer than a worker may be silent."""
        if not 0 < self.beat_seconds <= threading.TIMEOUT_MAX:
            yield
            return
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.beat_seconds):
                self._beat_if_possible()

        thread = threading.Thread(target=beat, name=f"beats of {self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    # Orders.

    def _order(self) -> Order | None:
        """The syncer's order for this process, None if there is none yet."""
        order = read_order(self.storage, self.name)
        if order is None or order.incarnation != self.incarnation:
            if order is not None and self._known:
                raise OccupiedError(f"another process works as {self.name!r} now; this one ends. Names must differ.")
            return None
        if not self._known:
            self._known = True
            self._remove_pushes()  # of a process before this one; what was accepted of them the syncer has
        require(not order.refused, f"the syncer refuses worker {self.name!r}: {order.refused}.")
        return order

    def _look(self) -> None:
        """In a lease: drop it if the syncer has taken it back."""
        try:
            order = self._order()
        except StorageError:
            return
        if order is not None and self.lease is not None and order.answered >= self.lease.id:
            self._drop(order)

    def _drop(self, order: Order) -> None:
        """Forget what was learned in a lease whose samples are given out again."""
        self.say(f"lease {order.answered} was taken back: {order.outcome}")
        if self.outgoing is not None:
            self._remove_pushes(self.outgoing.envelope.lease)
            if self.outgoing.envelope.lease == order.answered:
                self.feedback[self.outgoing.envelope.fragment].take_back()
        self.phase, self.lease, self.outgoing, self._awaited = "idle", None, None, None
        self.versions, self.tokens = [-1] * len(self.versions), [0] * len(self.tokens)

    def _is_over(self) -> bool:
        """Whether the run has ended without this process, as an answer to any worker says: the syncer may be gone."""
        names = self.storage.names(ORDERS)[:1]
        orders = [read_order(self.storage, name.removesuffix(".json")) for name in names]
        return any(order is not None and order.finished for order in orders)

    def _idle(self) -> Did:
        order = self._order()
        if order is None and not self._is_over():
            return "waited"
        if order is None or order.finished:
            self.finished = True
            self.beat()
            return "finished"
        if self._awaited is not None and order.answered >= self._awaited.id and order.outcome != "merged":
            self._drop(order)
        elif self._awaited is not None and order.again > self._attempt():
            return self._send_again(order.again)
        if not self.run.diloco.overlap_steps and not self._settled(order):
            return "waited"
        return self._begin(order)

    def _attempt(self) -> int:
        return 0 if self.outgoing is None else self.outgoing.envelope.attempt

    def _settled(self, order: Order) -> bool:
        """Whether nothing is awaited any more; a merge is taken over."""
        if self._awaited is None:
            return True
        return order.answered >= self._awaited.id and self._take_over(order)

    def _begin(self, order: Order) -> Did:
        """Start the lease of the order, if there is a new one."""
        if order.lease is None or order.lease.id <= self._last_lease:
            return "waited"
        fresh = -1 in self.versions
        if fresh and not self._load(order, range(len(self.versions))):
            return "waited"
        self.lease = order.lease
        self._last_lease, self.phase, self._done, self._sum, self._targets = order.lease.id, "working", 0, 0.0, 0
        self.inner.start(order.lease.first // self.run.train.data.batch_size)
        self._began = self.clock()
        return "fetched"

    # Merged weights.

    def _load(self, order: Order, fragments: range) -> bool:
        """Take over merged weights; False, and nothing changed, if the folder has moved on meanwhile."""
        found = {}
        for i in fragments:
            have = (self.versions[i], self.anchors[i]) if self.anchors and self.versions[i] >= 0 else None
            try:
                with self._beating():
                    found[i] = self.bases.fetch(i, order.versions[i], have)
            except FileNotFoundError:
                return False
        self.anchors = self.anchors or [torch.zeros(size) for size in self.layout.sizes]
        for i, vector in found.items():
            local = self._blended(i, vector)
            self.anchors[i], self.versions[i] = vector, order.versions[i]
            self.layout.write(self.inner.model, i, local)
        return True

    def _blended(self, fragment: int, merged: Tensor) -> Tensor:
        """Merged weights, with a part of this worker's own where they are taken over in the middle of a lease."""
        part = self.run.diloco.blend if self.versions[fragment] >= 0 else 0.0
        return merged if part == 0 else torch.lerp(merged, self.layout.read(self.inner.model, fragment), part)

    def _take_over(self, order: Order) -> bool:
        """Take over the merge of the awaited push."""
        assert self._awaited is not None
        fragment = self._awaited.fragment
        if not self._load(order, range(fragment, fragment + 1)):
            return False
        lease, self._awaited, self.outgoing = self._awaited.id, None, None
        self._remove_pushes(lease)
        return True

    def _remove_pushes(self, lease: int | None = None) -> None:
        """Remove this worker's push for a lease, or all; what cannot be removed now does no harm."""
        folder, wanted = f"{WORKERS}/{self.name}/push", "" if lease is None else f"{lease:08d}."
        with contextlib.suppress(StorageError):
            for name in self.storage.names(folder):
                if name.startswith(wanted):
                    self.storage.remove(f"{folder}/{name}")

    # Work.

    def _work(self) -> Did:
        lease, batch_size = self.lease, self.run.train.data.batch_size
        assert lease is not None
        if self._blocked():
            return self._wait_for_merge()
        made = self.inner.step(lease.first // batch_size + self._done)
        self._done, self.steps = self._done + 1, self.steps + 1
        self.tokens = [tokens + made.tokens for tokens in self.tokens]
        if math.isfinite(made.nats):
            self._sum, self._targets = self._sum + made.nats, self._targets + made.targets
        self._measure()
        if self._done * batch_size < lease.count or self._awaited is not None:
            return "stepped"
        self._encode(lease)
        return "encoded"

    def _blocked(self) -> bool:
        """Whether this lease cannot go on before the merge of the last push has been taken over."""
        assert self.lease is not None
        length = self.lease.count // self.run.train.data.batch_size
        return self._awaited is not None and self._done >= min(length, self.run.diloco.overlap_steps)

    def _wait_for_merge(self) -> Did:
        order = self._order()
        assert self._awaited is not None
        if order is None or order.answered < self._awaited.id:
            return "waited"
        if order.outcome != "merged":
            self._drop(order)
            return "waited"
        if not self._take_over(order):
            return "waited"
        lease = self.lease
        assert lease is not None
        self._began = self.clock()
        if self._done * self.run.train.data.batch_size < lease.count:
            return "fetched"
        self._encode(lease)
        return "encoded"

    def _measure(self) -> None:
        """A running mean of the seconds per step, on this machine's own clock."""
        now = self.clock()
        seconds, self._began = now - self._began, now
        old = self.seconds_per_step
        self.seconds_per_step = seconds if old == 0 else 0.8 * old + 0.2 * seconds

    def _encode(self, lease: Lease) -> None:
        """Make the push of a finished lease."""
        i = lease.fragment
        gradient = self.anchors[i] - self.layout.read(self.inner.model, i)
        data = pack(self.feedback[i].encode(gradient))
        envelope = Envelope(
            worker=self.name,
            incarnation=self.incarnation,
            run=self.run.id,
            layout=self.layout.digest,
            lease=lease.id,
            attempt=0,
            fragment=i,
            version=self.versions[i],
            tokens=self.tokens[i],
            codec=self.run.diloco.up,
            size=len(data),
            sha256=digest(data),
            loss_nats=self._sum / max(1, self._targets),
        )
        self.outgoing, self.phase, self.tokens[i] = Outgoing(envelope, data), "ready", 0

    def _push(self) -> Did:
        assert self.outgoing is not None
        self.beat()
        with self._beating():
            write_push(self.storage, self.outgoing, self.key)
        e = self.outgoing.envelope
        self.say(f"pushed lease {e.lease}: {e.tokens:,} tokens, loss {e.loss_nats:.4f}, {e.size:,} bytes")
        self._awaited, self.lease, self.phase = self.lease or self._awaited, None, "idle"
        return "pushed"

    def _send_again(self, attempt: int) -> Did:
        assert self.outgoing is not None
        self.outgoing = self.outgoing._replace(envelope=self.outgoing.envelope.next_attempt(attempt))
        with self._beating():
            write_push(self.storage, self.outgoing, self.key)
        return "pushed"
