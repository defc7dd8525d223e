"""The same small run under every policy, on the simulator's clock: a table, a JSON file and a picture."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastweight.configs import check_types, near_names, require, to_json
from fastweight.data import Store, prepare
from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.outer import OuterConfig
from fastweight.diloco.picture import plot_loss_by_time
from fastweight.diloco.simulate import Simulated, World, check_finished, ddp_bytes_per_token, simulate
from fastweight.files import write_text
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.train import DataConfig, LogConfig, TrainConfig

Say = Callable[[str], None]
MEAN = OuterConfig(kind="sgd", lr=1.0)
PICTURE, RESULT = "loss_by_time.png", "result.json"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is simulated. steps: inner steps of all workers together, of batch_size × seq_len bytes each.

    policies: names of `POLICIES`, in the order of the table. seeds: repetitions, with other weights and data order.
    """

    world: World = field(default_factory=lambda: World(mbit_per_second=1.0))
    policies: tuple[str, ...] = ()
    steps: int = 480
    lease_steps: int = 12
    seq_len: int = 64
    batch_size: int = 4
    lr: float = 4e-3
    heldout_tokens: int = 2048
    seeds: int = 1

    def __post_init__(self) -> None:
        check_types(self, "simulate")
        for name in ("steps", "lease_steps", "seeds"):
            require(getattr(self, name) >= 1, f"simulate: {name} must be at least 1, got {getattr(self, name)}.")
        for name in self.policies:
            require(name in POLICIES, f"simulate: unknown policy {name!r}.{near_names(name, POLICIES)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The policies, all of them if none was named."""
        return self.policies or tuple(POLICIES)

    def train(self, seed: int) -> TrainConfig:
        """The inner training."""
        return TrainConfig(
            data=DataConfig(seq_len=self.seq_len, batch_size=self.batch_size),
            optimizer=OptimizerConfig(lr=self.lr),
            schedule=ScheduleConfig(kind="wsd", warmup_steps=min(40, self.steps // 4), final_ratio=0.0),
            log=LogConfig(heldout_tokens=self.heldout_tokens),
            steps=self.steps,
            seed=seed,
            device="cpu",
        )


def small_model(seed: int) -> Model:
    """Window attention and a delta memory over bytes, 100,000 parameters."""
    mixers = (AttentionConfig(num_heads=4, window=32), DeltaConfig(num_heads=2, head_dim=32, conv_width=2))
    feed_forward = FeedForwardConfig(hidden=128)
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=feed_forward, pre_conv=4) for mixer in mixers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(ModelConfig(vocab_size=257, d_model=64, blocks=blocks, tie_embeddings=True))


def _by_speed(plan: Rehearsal, **changes: Any) -> DilocoConfig:
    """Leases in proportion to speed."""
    return DilocoConfig(lease_steps=plan.lease_steps, dylu=True, min_steps=min(5, plan.lease_steps), **changes)


def _quorum(plan: Rehearsal, **changes: Any) -> DilocoConfig:
    """Half of the workers start a merge, which waits for as long as the fastest needs for a tenth of its lease."""
    speeds = plan.world.speeds
    grace = 0.1 * plan.lease_steps * min(speeds)
    return _by_speed(plan, quorum=max(1, len(speeds) // 2), grace_seconds=grace, **changes)


def _naive(plan: Rehearsal) -> DilocoConfig:
    """Every arrival moves the weights and the momentum. With the rate of synchronous merges it diverges at once."""
    outer = OuterConfig(lr=0.7 / len(plan.world.speeds))
    return DilocoConfig(lease_steps=plan.lease_steps, quorum=1, age_weight="none", max_age=1000, outer=outer)


def _delayed(plan: Rehearsal) -> DilocoConfig:
    outer = OuterConfig(kind="delayed_nesterov", delay=len(plan.world.speeds))
    return _by_speed(plan, quorum=1, outer=outer)


def _sparse(plan: Rehearsal) -> DilocoConfig:
    return _quorum(plan, up="topk2", down="int8", error_decay=0.95, outer=MEAN)


POLICIES: dict[str, Callable[[Rehearsal], DilocoConfig]] = {
    "synchronous": lambda plan: DilocoConfig(lease_steps=plan.lease_steps),
    "synchronous-mean": lambda plan: DilocoConfig(lease_steps=plan.lease_steps, outer=MEAN),
    "naive": _naive,
    "delayed-dylu": _delayed,
    "quorum": _quorum,
    "quorum-mean": lambda plan: _quorum(plan, outer=MEAN),
    "quorum-bf16": lambda plan: _quorum(plan, up="bf16", down="bf16"),
    "quorum-int8": lambda plan: _quorum(plan, up="int8", down="int8"),
    "quorum-int4": lambda plan: _quorum(plan, up="int4", down="int4"),
    "quorum-topk2": _sparse,
}


def rehearse(out: Path, plan: Rehearsal, store: Path | None = None, *, say: Say = print) -> dict[str, Any]:
    """Simulate every policy with every seed; write loss_by_time.png and result.json into `out`, return the result.

    store: a byte-level token store; None: the standard library of this Python, prepared in `out`.
    """
    data = Store.open(store or _prepare(out / "data", say))
    require(data.tokenizer.vocab_size <= 257, f"simulate: {data.path} is not byte-level; prepare it with bytes.")
    runs: dict[str, list[Simulated]] = {}
    for name in plan.names:
        runs[name] = [_play(name, plan, data, seed) for seed in range(plan.seeds)]
        check_finished(runs[name])
        row = describe_runs(runs[name], plan)
        say(f"{name}: loss {row['loss_nats']:.4f} after {row['seconds']:,.0f} s, {row['merges']:.0f} merges")
    result = {
        "plan": dataclasses.asdict(plan),
        "rows": {name: describe_runs(found, plan) for name, found in runs.items()},
        "runs": {name: [run.to_dict() for run in found] for name, found in runs.items()},
        "picture": str(out / PICTURE),
    }
    plot_loss_by_time({name: [run.curve for run in found] for name, found in runs.items()}, out / PICTURE)
    write_text(out / RESULT, to_json(result) + "\n")
    return result


def describe_runs(runs: Sequence[Simulated], plan: Rehearsal) -> dict[str, Any]:
    """The row of a policy: means over the seeds, and how far the losses are apart."""
    losses = [run.loss_nats for run in runs]
    parameters, workers = runs[0].model.num_parameters, len(plan.world.speeds)
    moved = statistics.mean((run.bytes_up + run.bytes_down) / run.tokens for run in runs)
    ddp = ddp_bytes_per_token(parameters, workers, workers * plan.batch_size * plan.seq_len)
    return {
        "loss_nats": statistics.mean(losses),
        "loss_spread": max(losses) - min(losses),
        "seconds": statistics.mean(run.seconds for run in runs),
        "merges": statistics.mean(run.merges for run in runs),
        "steps": runs[0].steps,
        "bytes_up_per_token": statistics.mean(run.bytes_up / run.tokens for run in runs),
        "bytes_down_per_token": statistics.mean(run.bytes_down / run.tokens for run in runs),
        "ddp_bytes_per_token": ddp,
        "fewer_bytes_than_ddp": ddp / moved,
    }


def _play(name: str, plan: Rehearsal, store: Store, seed: int) -> Simulated:
    return simulate(small_model(seed), store, plan.train(seed), POLICIES[name](plan), plan.world)


def _prepare(folder: Path, say: Say) -> Path:
    say("text: the standard library of this Python, a byte per token")
    prepare("python-stdlib", "bytes", folder)
    return folder
