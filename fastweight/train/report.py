"""What a run tells its user, on stderr: first what runs, then a progress bar, then what happened."""

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from fastweight.backends import describe_backends, describe_layers
from fastweight.data import Store
from fastweight.distributed.team import Team
from fastweight.effort import TRAINING, effective_parameters, forward_flops
from fastweight.model import Model
from fastweight.train.config import TrainConfig
from fastweight.train.signals import let_go, terminals

SECONDS_BETWEEN_LINES = 10


class Report:
    """Progress of one run. On a terminal a bar; elsewhere a line every few seconds. quiet: nothing at all."""

    def __init__(self, config: TrainConfig, quiet: bool):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.total = config.steps
        self.max_seconds = config.max_seconds
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._began: tuple[float, float] | None = None  # when, and at which fraction of the run
        self._terminals = terminals()

    def _writing(self, act: Callable[[], object]) -> None:
        """Do what writes. A terminal may go without a signal, as that of a disowned job does: that ends no run."""
        try:
            act()
        except OSError:
            if not let_go(self._terminals):
                raise
            self._bar, self._terminals = None, []

    def say(self, text: str) -> None:
        """Print one line."""
        self._writing(lambda: self.console.print(text, markup=False))

    def start(self, step: int) -> None:
        """Show the bar, if there is a terminal."""
        if not self.console.is_terminal or self.console.quiet:
            return
        fixed, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("step {task.fields[step]}/{task.fields[steps]}", table_column=fixed),
            BarColumn(bar_width=8),
            TimeRemainingColumn(table_column=fixed),
            TextColumn("left {task.fields[text]}", table_column=rest),
        )
        self._bar = Progress(*columns, console=self.console, expand=True)
        self._bar.add_task("train", total=1.0, step=step, steps=self.total, text="")
        self._writing(self._bar.start)

    def advance(self, step: int, fraction: float, text: str = "") -> None:
        """Move the bar to `fraction` of the run; `text` (loss, tokens/s) where there is news."""
        self._began = self._began or (time.monotonic(), fraction)
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=fraction)
            self._bar.tasks[0].fields.update({"step": step} | ({"text": text} if text else {}))
        elif text and (time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or step >= self.total):
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.total}  {text}{self._left(fraction)}")

    def _left(self, fraction: float) -> str:
        """ "  3:20 left", by the pace so far; nothing before there is one."""
        began, first = self._began or (0.0, 1.0)
        if fraction <= first:
            return ""
        seconds = round((time.monotonic() - began) * (1 - fraction) / (fraction - first))
        return f"  {seconds // 60}:{seconds % 60:02d} left"

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._writing(self._bar.stop)
            self._bar = None


def describe_run(config: TrainConfig, model: Model, store: Store, device: torch.device, team: Team) -> list[str]:
    """Lines that say what runs: model, data, optimiser, and the backend of each op with the reason."""
    if not team.leads:
        return []
    data, train = config.data, store.split("train")
    where = config.model.preset or config.model.folder or "given in Python"
    tokens = data.batch_size * data.seq_len
    budget = f", at most {config.max_seconds:g} s" if config.max_seconds else ""
    averaging = "" if config.averaging.kind == "none" else f", ends with averaged weights ({config.averaging.kind})"
    lines = [
        f"model: {where}, {model.num_parameters:,} parameters, blocks: {describe_layers(model.config)}, on {device} "
        f"({config.precision})",
        f"per token: {effective_parameters(model):,} parameters used, "
        f"{TRAINING * forward_flops(model):,} floating-point operations in matrices to learn it",
        f"data: {data.store}, {train.num_tokens:,} training tokens, tokenizer {store.tokenizer.name}, view {data.view}",
        f"run: {config.steps:,} steps of {data.batch_size} × {data.seq_len} = {tokens:,} tokens, "
        f"{config.optimizer.name}, {config.schedule.kind}{budget}{averaging}",
    ]
    if data.mix:
        rest = 1 - sum(data.mix.values())
        shares = ", ".join(f"{share:.1%} {path}" for path, share in {data.store: rest, **data.mix}.items())
        lines.append(f"mixture: {shares}")
    lines += [f"weights: {data.weights}"] if data.weights else []
    if team.size > 1:
        replicas, shards = config.mesh.sizes(team.size)
        parts = team.context.parts
        cut = f"; sequences are cut over {parts} processes" if parts > 1 else ""
        lines.append(f"mesh: {team.size} processes, {replicas} × the model, each cut into {shards}{cut}")
    tokens_as = torch.bfloat16 if config.precision == "bfloat16" else None
    return lines + [f"op {op}: {text}" for op, text in describe_backends(model, tokens_as).items()]


def describe_trained(config: TrainConfig, model: Model, names: list[str]) -> str:
    """What a run with frozen parameters trains, in one line."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    count, all_of_them = sum(sizes[name] for name in names), sum(sizes.values())
    return f"trains: {', '.join(config.trainable)}: {count:,} of {all_of_them:,} parameters; {config.objective.kind}"


def warn_of_faults(report: Report, sentences: list[str]) -> None:
    """Say which inner updates were skipped; the first three by name."""
    for sentence in sentences[:3]:
        report.say(f"warning: {sentence}")
    if len(sentences) > 3:
        report.say(f"warning: and {len(sentences) - 3} more")


def describe_heldout(values: dict[str, Any]) -> str:
    """Held-out losses in one line."""
    nats, bits = values["loss_nats"], values["bits_per_byte"]
    parts = [f"held-out loss {nats:.4f} nats, {bits:.3f} bits/byte"]
    parts += [f"objective {values['loss']:.4f}"] if "loss" in values else []
    if "transfer_error" in values:
        errors = (f"{entry['block']}: {entry['error']:.3f}" for entry in values["transfer_error"])
        parts.append(f"transfer error by block {', '.join(errors)}")
    return "; ".join(parts)


def summary(values: dict[str, Any]) -> str:
    """The numbers beside the bar."""
    own, nats, bits = values.get("loss"), values["loss_nats"], values["bits_per_byte"]
    parts = ["no good step"] if own is None and nats is None else []
    parts += [f"objective {own:.4f}"] if own is not None else []
    parts += [f"loss {nats:.4f} nats"] if nats is not None else []
    parts += [f"{bits:.3f} bits/byte"] if bits is not None else []
    parts += [f"mag {values['mag_weight']:.3f}"] if "mag_weight" in values else []
    return "  ".join([*parts, f"{values['tokens_per_second']:,.0f} tokens/s"])
