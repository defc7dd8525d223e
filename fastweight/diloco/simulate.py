"""A rehearsal in one process: real syncer, real workers, real training, on a clock that is only a number.

Nothing waits: the clock jumps from event to event, so a run is the same every time, on any machine. An inner step takes
the worker's seconds per step, an object its bytes divided by the bandwidth.
"""

import contextlib
import dataclasses
import heapq
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastweight.configs import check_types, require
from fastweight.data import Store
from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.learner import Did, Learner
from fastweight.diloco.lock import Lock
from fastweight.diloco.processes import merged_model
from fastweight.diloco.run import Run, create_run
from fastweight.diloco.storage import Storage
from fastweight.diloco.syncer import Syncer
from fastweight.model import Model
from fastweight.train import TrainConfig
from fastweight.train.heldout import heldout_losses
from fastweight.train.objectives import make_objective

# On the clock of a simulation nobody is silent because he is dead.
NEVER = 1e18
SYNCER = -1


@dataclass(frozen=True, kw_only=True)
class World:
    """Where a simulated run takes place."""

    speeds: tuple[float, ...] = (0.58, 0.75, 1.51, 3.33)
    """Seconds per inner step of each worker."""
    mbit_per_second: float = 0.0
    """Bandwidth of each worker in each direction; 0: objects move in no time."""

    def __post_init__(self) -> None:
        check_types(self, "world")
        require(bool(self.speeds) and min(self.speeds) > 0, f"world: speeds must be positive, got {self.speeds}.")
        require(self.mbit_per_second >= 0, f"world: mbit_per_second is negative: {self.mbit_per_second}.")

    def seconds(self, num_bytes: int) -> float:
        """How long so many bytes take."""
        return num_bytes * 8e-6 / self.mbit_per_second if self.mbit_per_second else 0.0


@dataclass
class Simulated:
    """What came out. curve: (seconds, samples counted, held-out loss in nats) after merges. model: the merged one."""

    run: Run
    model: Model
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    seconds: float = 0.0
    merges: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    steps: list[int] = field(default_factory=list)
    counted: list[list[int]] = field(default_factory=list)

    @property
    def loss_nats(self) -> float:
        """The last held-out loss."""
        return self.curve[-1][2]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the model."""
        names = ("curve", "seconds", "merges", "tokens", "bytes_up", "bytes_down", "steps", "counted")
        return {name: getattr(self, name) for name in names} | {"diloco": self.run.diloco.to_dict()}


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def memory_folder() -> Iterator[str]:
    """The address of a new folder in memory, empty again afterwards."""
    url = f"memory://diloco-{secrets.token_hex(8)}"
    try:
        yield url
    finally:
        storage = Storage(url)
        if storage.fs.exists(storage.root):
            storage.fs.rm(storage.root, recursive=True)


def simulate(
    model: Model, store: Store, train: TrainConfig, diloco: DilocoConfig, world: World, *, measure: bool = True
) -> Simulated:
    """Train `model`'s weights as `diloco` says in `world`. measure: held-out loss after merges, else at the end alone.

    `model` itself is not changed. The same arguments give the same result, bit for bit.
    """
    workers = len(world.speeds)
    diloco = dataclasses.replace(diloco, start_workers=workers, dead_seconds=NEVER)
    with memory_folder() as url:
        run = create_run(Storage(url), model, store, train, diloco, run_id="simulated")
        return _Simulation(url, run, store, world, measure).play()


class _Simulation:
    """One run, event by event."""

    def __init__(self, url: str, run: Run, store: Store, world: World, measure: bool):
        self.run, self.store, self.world, self.measure = run, store, world, measure
        self.clock = _Clock()
        storage = Storage(url)
        lock = Lock(storage, clock=self.clock, sleep=lambda seconds: None)
        self.syncer = Syncer(storage, run, lock, clock=self.clock)
        self.learners = [self._learner(url, i) for i in range(len(world.speeds))]
        # The events: when, whose. At one moment workers act in the order of their numbers.
        self.events = [(0.0, i) for i in range(len(self.learners))]
        self.parked: set[int] = set()
        self.result = Simulated(run, run.empty_model())

    def play(self) -> Simulated:
        while not self.syncer.finished:
            require(bool(self.events), "simulation: everybody waits for somebody else.")
            self.clock.now, who = heapq.heappop(self.events)
            if who != SYNCER:
                self._act(who)
            self._poll()
        return self._finish()

    def _learner(self, url: str, i: int) -> Learner:
        # With names of one length the bytes that are counted do not depend on chance.
        return Learner(
            Storage(url),
            self.run,
            f"worker-{i:03d}",
            self.store,
            clock=self.clock,
            beat_seconds=NEVER,
            incarnation=f"{i:016d}",
            device="cpu",
        )

    def _act(self, i: int) -> None:
        learner = self.learners[i]
        before = learner.storage.bytes_read
        did = learner.advance()
        if did == "waited":
            self.parked.add(i)
        elif did != "finished":
            heapq.heappush(self.events, (self.clock.now + self._lasts(i, did, before), i))

    def _lasts(self, i: int, did: Did, read_before: int) -> float:
        """Seconds until the worker's next event: a step is made, and an object is there, at the end of its time."""
        learner, seconds = self.learners[i], 0.0
        if did == "encoded":
            assert learner.outgoing is not None
            return self.world.seconds(learner.outgoing.envelope.size)
        if did == "fetched" and not self.run.diloco.overlap_steps:
            seconds = self.world.seconds(learner.storage.bytes_read - read_before)
        return seconds + (self.world.speeds[i] if learner.at_work else 0.0)

    def _poll(self) -> None:
        merges = self.syncer.state.ledger.merges
        if self.syncer.poll():
            for i in sorted(self.parked):
                heapq.heappush(self.events, (self.clock.now, i))
            self.parked.clear()
        if self.syncer.due is not None and (self.syncer.due, SYNCER) not in self.events:
            heapq.heappush(self.events, (self.syncer.due, SYNCER))
        if self.syncer.state.ledger.merges > merges and self.measure:
            self._measure()

    def _measure(self) -> None:
        ledger, train = self.syncer.state.ledger, self.run.train
        model = merged_model(self.run, self.syncer.state)
        split = self.store.split("heldout")
        loss = heldout_losses(model, make_objective(model, train), split, train)["loss_nats"]
        counted = sum(stop - start for start, stop in ledger.counted)
        self.result.curve.append((self.clock.now, counted, loss))

    def _finish(self) -> Simulated:
        result, ledger = self.result, self.syncer.state.ledger
        if not self.measure:
            self._measure()
        result.model = merged_model(self.run, self.syncer.state)
        result.seconds, result.merges, result.counted = self.clock.now, ledger.merges, ledger.counted
        result.tokens = self.run.total_samples * self.run.train.data.seq_len
        result.bytes_up = sum(learner.storage.bytes_written for learner in self.learners)
        result.bytes_down = sum(learner.storage.bytes_read for learner in self.learners)
        result.steps = [learner.steps for learner in self.learners]
        return result


def ddp_bytes_per_token(parameters: int, workers: int, tokens_per_step: int) -> float:
    """What all workers together send and receive per token when gradients are averaged at every step.

    A ring all-reduce of float32: each worker sends, and receives, 2 (K - 1) / K times the gradient per step.
    tokens_per_step: of all workers.
    """
    return 2 * 2 * (workers - 1) * 4 * parameters / tokens_per_step


def check_finished(results: Sequence[Simulated]) -> None:
    """Raise ValueError unless every sample of every run was counted exactly once."""
    for result in results:
        require(
            result.counted == [[0, result.run.total_samples]],
            f"samples were lost: counted {result.counted} of {result.run.total_samples}.",
        )
