"""Groups that train alone for a while, as threads of this process that meet without torchft; and DiLoCo in a loop."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from distributed import runs

from fastweight import Model
from fastweight.data import Store
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.replicas import decode, encode
from fastweight.optim import Optimizer, schedule_factor
from fastweight.train import TrainConfig, train
from fastweight.train.loss import count, train_on
from fastweight.train.source import step_batches

SECONDS = 120
STREAMING = {"every": 8, "fragments": 2, "overlap_steps": 1, "blend": 0.5}


class House:
    """Where `size` groups meet. heals: the round before which the second takes over what the first has; fails: the one
    that does not count at the first try."""

    def __init__(self, size: int = 2, heals: int = -1, fails: int = -1):
        self.size, self.heals, self.fails = size, heals, fails
        self.barrier = threading.Barrier(size)
        self.shown: dict[int, object] = {}

    def show(self, rank: int, value: object) -> list:
        """What all groups show at the same time, in their order."""
        self.shown[rank] = value
        self.barrier.wait(SECONDS)
        found = [self.shown[i] for i in range(self.size)]
        self.barrier.wait(SECONDS)
        return found


class Member:
    """Stands for a Quorum."""

    failed, sent_bytes = False, 0

    def __init__(self, house: House, config, team, name, word, state, load, first, count):
        self.house, self.state, self.load, self.round = house, state, load, count
        self.rank = {"one": 0, "two": 1}[name]

    def begin(self):
        states = self.house.show(self.rank, encode(self.state()))
        if self.round == self.house.heals and self.rank == 1:
            self.load(decode(states[0]))
        return self.rank, self.house.size

    def sum(self, values):
        return [sum(parts) for parts in zip(*self.house.show(self.rank, list(values)), strict=True)]

    def add(self, tensors):
        self.finish(self.start(tensors))

    def start(self, tensors):
        return list(tensors)

    def finish(self, started):
        self.sent_bytes += sum(tensor.nbytes for tensor in started)
        shown = self.house.show(self.rank, [tensor.clone() for tensor in started])
        for tensor, parts in zip(started, zip(*shown, strict=True), strict=True):
            tensor.copy_(sum(parts))

    def agreed(self):
        failed = self.round == self.house.fails
        self.house.show(self.rank, None)
        if failed:
            self.house.fails = -1
        self.round += not failed
        return not failed

    def close(self):
        if self.house.barrier.n_waiting:
            self.house.barrier.abort()  # nobody needs to wait for one that has failed


def rounds_config(store: Path | str, name: str, replicas: dict, **more) -> TrainConfig:
    settings = ReplicaConfig(most=2, least=2, lighthouse="http://localhost:1", **replicas)
    return runs.run_config(store, name, replicas=settings, **{"stats_every": 0, **more})


def make_together(house: House, config: TrainConfig, make: Callable[[], Model], outs: list[Path], **options) -> list:
    """The run of a model by as many groups as there are folders; returns their results."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(outs)) as pool:
        patch.setattr("fastweight.distributed.replicas.Quorum", functools.partial(Member, house))
        # All are made before the first one runs: threads share torch's random numbers.
        models = [None if options.get("resume") else make() for _ in outs]
        runs_of = [(config, out, model) for out, model in zip(outs, models, strict=True)]
        done = [pool.submit(train, config, out, model=model, quiet=True, **options) for config, out, model in runs_of]
    return [one.result() for one in done]


class Plain:
    """Synchronous, maybe streaming, DiLoCo in a loop, with torch's own outer optimiser.

    weights: those that all groups end with. losses: nats per target of each round.
    """

    def __init__(self, store: Path | str, config: TrainConfig, name: str, groups: int = 2, heals: int = -1):
        self.config, self.settings, self.groups = config, config.replicas, groups
        self.models = [runs.RUNS[name][0]() for _ in range(groups)]
        self.inner = [Optimizer(model, config.optimizer) for model in self.models]
        self.weights = {n: p.detach().clone() for n, p in self.models[0].named_parameters()}
        split = Store.open(store).split("train")
        self.readers = [step_batches(split, config.data, config.seed, 0, rank, groups) for rank in range(groups)]
        lr, momentum = self.settings.outer_lr, self.settings.outer_momentum
        self.outer = {
            n: torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=momentum > 0) for n, w in self.weights.items()
        }
        self.losses = []
        length = self.settings.every // self.settings.fragments
        for number in range(config.steps // length):
            if number == heals:
                self.models[1].load_state_dict(self.models[0].state_dict())
                self.inner[1].load_state_tensors({n: t.clone() for n, t in self.inner[0].state_tensors().items()})
            self.make(number, length)

    def make(self, number: int, length: int) -> None:
        last = (number + 1) * length == self.config.steps
        alone = length - (0 if last else self.settings.overlap_steps)
        nats, targets, ends = 0.0, 0, []
        for rank in range(self.groups):
            for j in range(length):
                if j == alone:
                    ends.append(self.copy(rank))
                one = self.step(rank, number * length + j)
                nats, targets = nats + one[0], targets + one[1]
            if alone == length:
                ends.append(self.copy(rank))
        self.losses.append(nats / targets)
        for name in self.due(number, last):
            weight, blend = self.weights[name], 0.0 if last else self.settings.blend
            weight.grad = sum(weight - end[name] for end in ends) / self.groups
            self.outer[name].step()
            for model in self.models:
                own = model.get_parameter(name)
                own.data = blend * own.data + (1 - blend) * weight

    def due(self, number: int, last: bool) -> list[str]:
        count, others, found = self.settings.fragments, 0, []
        for name in self.weights:
            parts = name.split(".")
            if parts[0] != "blocks":
                others += 1
            place = int(parts[1]) if parts[0] == "blocks" else others - 1
            found += [name] if last or place % count == number % count else []
        return found

    def copy(self, rank: int) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.models[rank].named_parameters()}

    def step(self, rank: int, step: int) -> tuple[float, int]:
        config, batches = self.config, next(self.readers[rank])
        targets = count(batches).targets
        sums = [train_on(self.models[rank], batch, None, targets, config.precision)[0] for batch in batches]
        inner = self.inner[rank]
        torch.nn.utils.clip_grad_norm_(list(inner.parameters()), config.clip_norm)
        inner.set_factor(schedule_factor(config.schedule, step, config.steps, config.optimizer.lr))
        inner.set_step(step)
        inner.step()
        inner.zero_grad()
        return float(sum(sums)), targets
