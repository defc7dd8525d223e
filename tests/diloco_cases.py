"""Small asynchronous runs in memory, driven by hand, and a plain DiLoCo to compare them with."""

import json

import torch
from training_cases import attention_model, tiny_config

from fastweight.diloco import DilocoConfig, Learner, Lock, Storage, Syncer, create_run
from fastweight.optim import Optimizer, schedule_factor
from fastweight.train.loss import train_on
from fastweight.train.source import step_batches


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Party:
    """A run in `url` with a syncer and workers that take turns, one action each."""

    def __init__(self, url, store, *, workers=2, steps=32, model=None, run_id="r", signed=False, keys=None, **changes):
        self.url, self.store, self.keys, self.clock = url, store, keys, Hand()
        config = DilocoConfig(**{"lease_steps": 4, "start_workers": workers, **changes})
        model = model or attention_model()
        self.run = create_run(
            Storage(url), model, store, tiny_config("x", steps=steps), config, run_id=run_id, signed=signed
        )
        self.syncer = self.new_syncer()
        self.learners = {f"w{i}": self.new_learner(f"w{i}") for i in range(workers)}

    def new_syncer(self, storage=None, **options):
        storage = storage or Storage(self.url)
        lock = Lock(storage, clock=self.clock, sleep=self.sleep)
        return Syncer(storage, self.run, lock, keys=self.keys, clock=self.clock, **options)

    def new_learner(self, name, *, incarnation="first", storage=None, run=None, **options):
        key = self.keys.get(name) if self.keys else None
        options = {"key": key, "beat_seconds": 0.0, "device": "cpu", **options}
        storage = storage or Storage(self.url)
        return Learner(storage, run or self.run, name, self.store, clock=self.clock, incarnation=incarnation, **options)

    def sleep(self, seconds):
        self.clock.now += seconds

    def turn(self, *names):
        """Every worker (or those named) does one thing, then the syncer looks."""
        for name in names or list(self.learners):
            self.learners[name].advance()
        self.syncer.poll()
        self.clock.now += 0.01

    def until(self, condition, *names, limit=400):
        for _ in range(limit):
            if condition():
                return
            self.turn(*names)
        raise AssertionError("it does not happen")

    def play(self):
        """To the end of the run; returns the merged weights of every fragment."""
        self.until(lambda: self.syncer.finished)
        return self.weights()

    @property
    def ledger(self):
        return self.syncer.state.ledger

    def weights(self):
        return [fragment.weights.clone() for fragment in self.syncer.state.fragments]

    def until_push(self, name="w0"):
        """Until the worker has a push ready that is not written yet; returns it."""
        self.until(lambda: self.ledger.last_lease >= len(self.learners))
        self.until(lambda: self.learners[name].phase == "ready", name)
        return self.learners[name].outgoing


def plain_diloco(model, store, train, *, workers, lease_steps, lr=0.7, momentum=0.9):
    """Synchronous DiLoCo in a loop: no folder, no leases, torch's own outer optimiser. Returns the outer weights."""
    outer = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.SGD(outer, lr=lr, momentum=momentum, nesterov=momentum > 0)
    replicas = [type(model)(model.config) for _ in range(workers)]
    inner = [Optimizer(replica, train.optimizer) for replica in replicas]
    for round_ in range(train.steps // (workers * lease_steps)):
        for p in outer:
            p.grad = torch.zeros_like(p)
        for k, replica in enumerate(replicas):
            for p, start in zip(replica.parameters(), outer, strict=True):
                p.data.copy_(start)
            first = (round_ * workers + k) * lease_steps
            batches = step_batches(store.split("train"), train.data, train.seed, first)
            for n in range(first, first + lease_steps):
                _step(replica, inner[k], next(batches), train, n)
            for p, end in zip(outer, replica.parameters(), strict=True):
                p.grad += (p.detach() - end.detach()) * (1 / workers)
        optimizer.step()
    return {name: p.detach() for (name, _), p in zip(model.named_parameters(), outer, strict=True)}


def _step(model, optimizer, batches, train, n):
    (batch,) = batches
    train_on(model, batch, None, batch.num_targets, train.precision)
    torch.nn.utils.clip_grad_norm_(list(optimizer.parameters()), train.clip_norm)
    optimizer.set_factor(schedule_factor(train.schedule, n, train.steps, train.optimizer.lr))
    optimizer.step()
    optimizer.zero_grad()


def entries(url):
    """The entries of the log in `url`."""
    storage = Storage(url)
    return [json.loads(storage.read(f"log/{name}"))["entry"] for name in storage.names("log")]
