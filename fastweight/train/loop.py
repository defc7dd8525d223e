"""The loop: read, learn, report, save; and go on exactly where it stopped."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.data import Batch, Store
from fastweight.distributed.context import Slice
from fastweight.distributed.copies import read_state
from fastweight.distributed.outer import Outer
from fastweight.distributed.shards import full, go_on, whole
from fastweight.distributed.team import Team
from fastweight.mixers.ttt import inner_lr_warmup
from fastweight.model import Model
from fastweight.optim import Optimizer, schedule_factor, weight_decay_factor
from fastweight.state import ModelState
from fastweight.train import checkpoint, folders, partial
from fastweight.train.averaging import make_average
from fastweight.train.carried import deal_rows, gather_rows
from fastweight.train.compiling import compile_for
from fastweight.train.config import TrainConfig
from fastweight.train.ending import finish
from fastweight.train.heldout import heldout_losses
from fastweight.train.inner import inner_statistics
from fastweight.train.loops import LoopFollower
from fastweight.train.loss import Counts, autocast, count
from fastweight.train.mag import MagFollower
from fastweight.train.metrics import Metrics, NoMetrics, finite
from fastweight.train.objectives import make_objective
from fastweight.train.recovery import Recovery, note
from fastweight.train.replicas import Alone
from fastweight.train.report import Report, describe_heldout, summary, warn_of_faults
from fastweight.train.rounding import rounded
from fastweight.train.rounds import make_groups
from fastweight.train.saving import TeamWriter
from fastweight.train.signals import SIGNALS, StopRequest
from fastweight.train.source import Reader, shares, training_splits
from fastweight.train.tally import Tally, TrainResult

# The attribute by which a layer lets its base inner learning rate be scaled.
INNER_RATE = "inner_lr_scale"


class DivergedError(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Trainer:
    """One run in one folder, from wherever `tally` says to the end."""

    def __init__(
        self, config: TrainConfig, out: Path, model: Model, store: Store, tally: Tally, report: Report,
        metrics: Metrics | NoMetrics, team: Team | None = None,
    ):  # fmt: skip
        self.config, self.out, self.model, self.store = config, out, model, store
        self.tally, self.report, self.metrics = tally, report, metrics
        self.team = team or Team()
        self.device = model.device
        self.objective = make_objective(model, config)
        self.optimizer = Optimizer(model, config.optimizer)
        self.trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.average = make_average(model, config)
        self.outer = Outer(dict(model.named_parameters()), config.replicas) if config.replicas.every else None
        self.writer = TeamWriter(out, self.team, config.log.keep_checkpoints)
        self.mag = MagFollower(model, config.mag)
        self.loops = LoopFollower(model, config.loops, config.seed)
        self.carried: list[ModelState] | None = None
        self.saved_step = -1
        self.recovery: Recovery | None = None
        self.groups = Alone()
        self._started = time.monotonic() - tally.seconds
        self._interval = (0.0, 0)
        self._faults: list[str] = []
        self._scaled = [mixer for mixer in model.mixers() if hasattr(mixer, INNER_RATE)]
        require(
            bool(self._scaled) or not config.inner_rate.steps,
            "inner_rate.steps: no layer of this model has a base inner learning rate to warm up. Set it to 0.",
        )

    def run(self, stop: StopRequest) -> TrainResult:
        """Train until the steps, the time or a signal end it; save, and say what came out."""
        config, tally, team = self.config, self.tally, self.team
        self.mag.set(self._mag_step())
        splits, ahead = training_splits(self.store, config.data), self.device.type == "cuda"
        reader = Reader(splits, config.data, config.seed, ahead=ahead)
        if config.compile:
            self._compile(reader.read(tally.step, team.reader, team.readers)[0])
        if self.saved_step < 0:
            # The first checkpoint before the first step: a disk that is full or read-only shows now, not in an hour.
            if config.log.before_after:
                tally.before = self.measure("before")
                self._started = time.monotonic()
            self.save()
        self.report.start(tally.step)
        self.groups = make_groups(self)
        try:
            while not (ended := self._ended(stop)):
                rank, size = self.groups.begin()
                if size:
                    self.step(reader.read(tally.step, rank * team.readers + team.reader, size * team.readers))
        finally:
            self.groups.close()
            self.report.stop()
            self._set_inner_rate(1.0)
            self.loops.settle(1.0)
        if self.saved_step != tally.step:
            self.save()
        self.writer.finish()
        return finish(self, "" if ended == "steps" else ended)

    def _compile(self, batch: Batch) -> None:
        """Compile on this batch before the clock goes on; nothing is learned from it."""
        started = time.monotonic()
        self.loops.settle(1.0)
        compile_for(self.objective, self.team.context.cut(batch).batch.to(self.device))
        self.optimizer.zero_grad()
        self._started += time.monotonic() - started
        self.report.say(f"compiled in {time.monotonic() - started:.0f} s")

    def save(self) -> None:
        """Write a checkpoint of now; a team only begins to, and goes on."""
        self.tally.seconds, step, keep = self._seconds(), self.tally.step, self.config.log.keep_checkpoints
        carried = gather_rows(self.carried, self.team)
        if self.team.size == 1:
            folders.write_checkpoint(self.out, step, lambda folder: self._write(folder, carried), keep)
        else:
            self.writer.start(step, self.tensors(), lambda folder: self._write_rest(folder, carried))
        self.saved_step = step

    def _write(self, folder: Path, carried: list[ModelState] | None) -> None:
        """All of a checkpoint of one process."""
        if self.config.partial:
            partial.save_trained(folder, self.model, self.trained)
        else:
            checkpoint.save_model(folder, self.model, self.store.tokenizer)
        checkpoint.save_trainer(folder, self.optimizer, self.tally, carried)
        if self.average is not None:
            checkpoint.save_tensors(folder / checkpoint.AVERAGED, self.average.state_tensors())
        if self.outer is not None:
            checkpoint.save_tensors(folder / checkpoint.OUTER, self.outer.state_tensors())

    def _write_rest(self, folder: Path, carried: list[ModelState] | None) -> None:
        """What of a team's checkpoint its leader writes alone."""
        if not self.config.partial:
            checkpoint.save_config(folder, self.model, self.store.tokenizer)
        checkpoint.save_trainer(folder, None, self.tally, carried)

    def tensors(self) -> dict[str, Tensor]:
        """What of a checkpoint has the size of the model, by the names of `checkpoint.open_tensors`."""
        weights = dict(self.model.named_parameters())
        word = "trained" if self.config.partial else "model"
        named: dict[str, Tensor] = {
            f"{word}:{name}": weights[name] for name in (self.trained if self.config.partial else weights)
        }
        for word, keeper in self._keepers():
            named |= {f"{word}:{name}": tensor for name, tensor in keeper.state_tensors().items()}
        return named

    def _keepers(self) -> list[tuple[str, Any]]:
        """What beside the model has tensors to go on with, each with the word for it in `checkpoint.open_tensors`."""
        keepers = (("optimizer", self.optimizer), ("averaged", self.average), ("outer", self.outer))
        return [(word, keeper) for word, keeper in keepers if keeper is not None]

    def restore(self, resumed: checkpoint.Resumed) -> None:
        """Take over what a checkpoint holds besides model and tally."""
        parameters = dict(self.model.named_parameters())
        with checkpoint.open_tensors(resumed.folder) as tensors:
            for word, keeper in self._keepers():
                keeper.load_state_tensors(read_state(tensors.under(word), parameters))
        checkpoint.set_random_state(resumed.rng)
        share, rows = shares(self.config.data, self.team.readers)
        if resumed.carried is not None:
            self.carried = deal_rows(resumed.carried, rows, share // rows, self.team.reader)
        self.saved_step = self.tally.step

    def _ended(self, stop: StopRequest) -> str:
        if self.groups.busy:
            return ""
        name = self._signal(stop)
        if name:
            return name
        if self.tally.step >= self.config.steps:
            return "steps"
        return "time" if self.config.max_seconds and self._seconds() >= self.config.max_seconds else ""

    def _signal(self, stop: StopRequest) -> str:
        """The signal that asked this process, or any other of the team, to stop; on the way, a checkpoint that all have
        written is made to count."""
        *asked, written = self.team.sum([*(int(stop.name == number.name) for number in SIGNALS), int(self.writer.done)])
        if written == self.team.size:
            self.writer.finish()
        return next((number.name for number, votes in zip(SIGNALS, asked, strict=True) if votes), "")

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step == self.config.steps

    def _seconds(self) -> float:
        """Training time, by the leader's clock: the rate may follow it."""
        return self.team.of_first(time.monotonic() - self._started)

    def _fraction(self) -> float:
        """The part of the run that is over."""
        part = self.tally.step / self.config.steps
        return max(part, min(1.0, self._seconds() / self.config.max_seconds)) if self.config.max_seconds else part

    def _mag_step(self) -> int:
        """Where the schedule of μ is: the step about to be made; in a run with a time budget, by the clock."""
        return round(self._fraction() * self.config.steps) if self.config.max_seconds else self.tally.step

    def step(self, batches: list[Batch]) -> None:
        """One step and all that is due after it."""
        tally, started = self.tally, time.monotonic()
        parts = [self.team.context.cut(batch) for batch in batches]
        (tokens,) = self.groups.sum(tuple(self.team.sum([sum(part.batch.tokens.numel() for part in parts)])))
        rate = self._update(parts)
        if rate is None:
            return
        tally.step += 1
        settled = self.groups.settled(tokens)
        tally.tokens += settled or 0
        seconds, before = self._interval
        self._interval = (seconds + time.monotonic() - started, before + (settled or 0))
        if settled is not None:
            self._follow(rate, batches[0])
        elif not self.groups.busy:
            self._faults = []  # the steps are made again
        self.report.advance(tally.step, self._fraction())

    def _follow(self, rate: float, batch: Batch) -> None:
        """All that is due after steps that count, the last of them at `rate`; `batch`: some of what it has read."""
        log, tally = self.config.log, self.tally
        done = tally.step == self.config.steps
        if self.recovery is not None:
            self.recovery.note(self.metrics, self.report, tally.step - self.groups.length)
            self.recovery = None
        if (seconds := self.groups.lost_seconds()) is not None:
            note(self.metrics, self.report, tally.step - self.groups.length, seconds, 0)
        if done or self._is_due(log.every):
            self._log(rate)
        if self._is_due(log.stats_every):
            self._log_inner(batch)
        if log.heldout_every and (done or self._is_due(log.heldout_every)):
            self._log_heldout()
        if self._is_due(log.checkpoint_every):
            self.save()

    def _is_due(self, every: int) -> bool:
        """Whether the steps that count now have reached a multiple of `every`."""
        step = self.tally.step
        return bool(every) and step // every > (step - self.groups.length) // every

    def _update(self, parts: list[Slice]) -> float | None:
        """One update of the weights, or a skipped one; returns the learning rate, None if the step must be repeated."""
        config, tally = self.config, self.tally
        counts = Counts(*self.groups.sum(tuple(self.team.sum(count([part.batch for part in parts])))))
        self._warm_inner_rate()
        self.mag.set(self._mag_step())
        self.loops.set(tally.step, self._fraction())
        factor = schedule_factor(
            config.schedule,
            tally.step,
            config.steps,
            config.optimizer.lr,
            self._fraction() if config.max_seconds else None,
        )
        totals = self.team.sum_floats(self.objective.totals([part.batch for part in parts]))
        if totals:
            totals = self.groups.add(torch.tensor(totals, dtype=torch.float64), []).tolist()
        sums, norm = self._gradients(parts, max(1, counts.targets), [total or 1.0 for total in totals])
        if not self.groups.agreed():
            self.optimizer.zero_grad()
            self._faults = []
            return None
        if all(map(math.isfinite, sums)) and math.isfinite(norm):
            self._apply(factor)
            self._count(sums, counts)
            tally.bad_row, tally.grad_norm = 0, norm
        else:
            self._skip(sums, norm)
        self.optimizer.zero_grad()
        return factor * config.optimizer.lr

    def _apply(self, factor: float) -> None:
        """Apply the gradients at `factor` times the peak rate, and average."""
        self.optimizer.set_factor(factor)
        self.optimizer.set_decay_factor(weight_decay_factor(self.config.schedule, self._fraction()))
        self.optimizer.set_step(self.tally.step)
        self.optimizer.step()
        if self.average is not None:
            # The low rates of the warm-up are no end of the run, which is when snapshots are taken.
            warming = self.tally.step < self.config.schedule.warmup_steps
            self.average.update(1.0 if warming else factor)

    def _count(self, sums: list[float], counts: Counts) -> None:
        """Add the sums of a good step to the tally."""
        if self.objective.reads_text:
            self.tally.add(sums[0], counts.targets, counts.bytes)
        if len(sums) > 1:
            self.tally.add_parts(sums[1:], counts.targets)

    def _gradients(self, parts: list[Slice], num_targets: int, totals: list[float]) -> tuple[list[float], float]:
        """The objective's sums and the global gradient norm, the gradients clipped. The one device sync of a step."""
        carry, logged = self.config.carry_state, self._is_logged(self.tally.step + 1)
        states, total = [], torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            batch = part.batch.to(self.device, non_blocking=True)
            start = self._start_state(i, batch)
            rounding = rounded(self.model, self.config.rounding, self._fraction())
            with rounding, self.team.context.reading(self.model, part) as pieces:
                sums, state = self.objective.learn(batch, start, num_targets, totals)
            total = total + sums
            # Looking for faults waits for the device, and states are large: only where they are needed.
            for after in (pieces or [state]) if logged else []:
                self._faults += self._new_faults(i, start, after)
            states += [state] if carry and state is not None else []
        self.carried = states if carry else None
        parameters = list(self.optimizer.parameters())
        self.team.context.sum_gradients(parameters)
        total = self.groups.add(self.team.add(total), [p.grad for p in parameters if p.grad is not None])
        norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).to(self.device)
        if self.config.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        *sums, value = torch.cat([total, norm.to(total.dtype)[None]]).tolist()
        return sums, value

    def _start_state(self, i: int, batch: Batch) -> ModelState | None:
        """None for new states; with carry_state, the carried rows where a document goes on."""
        if not self.config.carry_state or self.carried is None:
            return None
        assert batch.continues is not None
        return go_on(self.model, self.carried[i], batch.continues)

    def _new_faults(self, i: int, start: ModelState | None, state: ModelState | None) -> list[str]:
        """The faults of one step: those that a carried state had before are not reported again."""
        if state is None:
            return []
        before = [] if start is None or self.carried is None else self.model.describe_faults(self.carried[i])
        return [sentence for sentence in self.model.describe_faults(state) if sentence not in before]

    def _skip(self, sums: list[float], norm: float) -> None:
        """Count a step that is not finite. Memories that are carried start anew: theirs may be what broke."""
        tally = self.tally
        tally.bad_steps, tally.bad_row = tally.bad_steps + 1, tally.bad_row + 1
        self.carried = None
        found = f"loss {sums[0]:g} nats" if self.objective.reads_text else f"loss {sums[1]:g}"
        self.report.say(f"warning: step {tally.step} skipped: {found}, gradient norm {norm:g}")
        if tally.bad_row >= self.config.max_bad_steps:
            raise DivergedError(
                f"{tally.bad_row} steps in a row were not finite (the last: step {tally.step}, {found}, "
                f"gradient norm {norm:g}). The last good checkpoint is {folders.latest(self.out)}. Lower optimizer.lr "
                f"(now {self.config.optimizer.lr:g}) or lengthen schedule.warmup_steps, and start again."
            )

    def _warm_inner_rate(self) -> None:
        warmup = self.config.inner_rate
        if warmup.steps:
            self._set_inner_rate(inner_lr_warmup(self.tally.step + 1, warmup.first_ratio, 1.0, warmup.steps))

    def _set_inner_rate(self, scale: float) -> None:
        for mixer in self._scaled:
            setattr(mixer, INNER_RATE, scale)

    def _log(self, rate: float) -> None:
        tally = self.tally
        means = tally.close_interval()
        tally.seconds = self._seconds()
        seconds, tokens = self._interval
        tally.fault_reports += self.team.sum([len(self._faults)])[0]
        warn_of_faults(self.report, self._faults)
        self._interval, self._faults = (0.0, 0), []
        names = ("loss_nats", "bits_per_byte", "grad_norm", "tokens", "bad_steps", "fault_reports", "seconds")
        values = {name: getattr(tally, name) for name in names} | {"lr": rate}
        values["tokens_per_second"] = tokens / max(1e-9, seconds)
        values |= (self.objective.describe(means) if means else {}) | self.mag.describe() | self.loops.describe()
        values |= self.groups.describe()
        self.metrics.write("train", tally.step, values)
        self.report.advance(tally.step, self._fraction(), summary(values))

    def _log_inner(self, batch: Batch) -> None:
        # Weights that were put together in bfloat16 meet inputs in float32.
        mixed = autocast(self.device, self.team.gather if self.team.gather == "bfloat16" else "float32")
        with torch.compiler.set_stance("force_eager"), whole(self.model), mixed:
            layers = inner_statistics(self.model, batch.to(self.device), self.config.log.stats_tokens)
        self.metrics.write("inner", self.tally.step, {"layers": layers})

    def _log_heldout(self) -> None:
        values = self.measure("heldout")
        self.tally.heldout_nats, self.tally.heldout_bits_per_byte = values["loss_nats"], values["bits_per_byte"]

    def measure(self, kind: str) -> dict[str, Any]:
        """Write and say the held-out losses as they are now; NaN is None, which JSON and so the checkpoint can hold."""
        self._set_inner_rate(1.0)
        self.loops.settle(self._fraction())
        values = heldout_losses(self.model, self.objective, self.store.split("heldout"), self.config, self.team)
        self.metrics.write(kind, self.tally.step, values)
        when = f"step {self.tally.step}" if kind == "heldout" else kind
        self.report.say(f"{when}: {describe_heldout(values)}")
        return finite(values)
