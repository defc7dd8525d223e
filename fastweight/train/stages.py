"""Training a conversion in three stages, each a run in its own folder; and the control that has no memory."""

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastweight.configs import check_types, require
from fastweight.convert.backbone import drop_memory
from fastweight.convert.mag import find_model, liza_layers, set_mag_weight
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.model import Model, load
from fastweight.optim import OptimizerConfig, ScheduleConfig
from fastweight.train import folders
from fastweight.train.config import (
    LORA,
    MEMORY,
    DataConfig,
    LogConfig,
    LoraConfig,
    ObjectiveConfig,
    Precision,
    TrainConfig,
    ViewName,
)
from fastweight.train.ending import RESULT
from fastweight.train.partial import weights_checksum
from fastweight.train.run import check_same_run, read_record, train
from fastweight.train.trainable import memory_parameters

TRANSFER, DISTILL, TUNE, CONTROL = "a-transfer", "b-distill", "c-lora", "control"
# A stage that ends by the clock has room for so many steps; its schedules follow the clock.
TIMED_STEPS = 1_000_000
WARMUP_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. It is left out with neither steps nor max_seconds; with both it ends with whichever comes first."""

    steps: int = 0
    """Updates."""
    max_seconds: float = 0.0
    """Training time."""
    lr: float = 1e-3
    """Peak learning rate; it falls along a cosine to a tenth."""
    trainable: tuple[str, ...] = (MEMORY,)
    """As in TrainConfig."""
    mag_start: float | None = None
    """Weight of the linear branch at the first step; it goes in a straight line to StagesConfig.mag_weight in the first
    half of the stage. None: it does not move."""

    def __post_init__(self) -> None:
        check_types(self, "stage")
        require(self.steps >= 0, f"stage: steps must not be negative, got {self.steps}.")
        require(self.max_seconds >= 0, f"stage: max_seconds must not be negative, got {self.max_seconds}.")

    @property
    def wanted(self) -> bool:
        """Whether the stage is run at all."""
        return bool(self.steps or self.max_seconds)


def _lora_stage() -> StageConfig:
    return StageConfig(lr=5e-4, trainable=(LORA,))


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """What the stages share, and each stage."""

    store: str
    """Folder of a token store, made with the model's own tokenizer."""
    view: ViewName = "bins"
    """bins: no document is read across its end. windows: documents run into each other; every row is full."""
    seq_len: int = 512
    """Tokens per bin or window."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int = 0
    """Sequences per forward pass, 0 for all."""
    mag_weight: float | None = None
    """Weight of the linear branch during the stages and after them; None: as the model has it."""
    transfer: StageConfig = field(default_factory=lambda: StageConfig(lr=3e-3))
    """A: every linear branch learns its own softmax branch."""
    distill: StageConfig = field(default_factory=StageConfig)
    """B: the whole model learns the logits of its backbone."""
    tune: StageConfig = field(default_factory=_lora_stage)
    """C: adapters, and the memory, learn the text."""
    cosine: float = 0.0
    """A: weight of 1 − cosine beside the squared error."""
    temperature: float = 1.0
    """B: of both distributions."""
    alpha: float = 0.0
    """B: part of the cross-entropy of the text."""
    lora: LoraConfig = field(default_factory=lambda: LoraConfig(rank=16, alpha=32.0))
    """The adapters of the stages that train them."""
    memory_rate: float = 4.0
    """Rate of the memory's parameters as a multiple of a stage's lr, where adapters learn at that."""
    mag_rate: float = 20.0
    """Rate of learned weights of linear branches (μ) as a multiple of a stage's lr."""
    seed: int = 0
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    """Compile each block in B and C (A trains its layers one by one): a minute or two at their start, then fewer
    launches."""
    device: str = "auto"
    heldout_tokens: int = 8192
    """Of the losses before and after each stage."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        check_types(self, "stages")
        require(any(stage.wanted for stage in self.stages.values()), "stages: no stage has steps or max_seconds.")
        moved = [name for name, stage in self.stages.items() if stage.mag_start is not None]
        require(
            not moved or self.mag_weight is not None,
            f"stages: {', '.join(moved)} has mag_start but no end to go to. Give mag_weight.",
        )

    @property
    def stages(self) -> dict[str, StageConfig]:
        """The stages in their order, by the names of their folders."""
        return {TRANSFER: self.transfer, DISTILL: self.distill, TUNE: self.tune}


@dataclass(frozen=True, kw_only=True)
class StagesResult:
    """model: what the last stage ended with, on the CPU; None if a signal stopped one. stopped: its name, or "".

    stages: each stage's TrainResult as plain data, by folder name, with `before` and `after`.
    """

    model: Model | None
    stopped: str
    stages: dict[str, dict[str, Any]]


def cpu_stages(store: str, **changes: Any) -> StagesConfig:
    """A few minutes on two cores for a model of some 100 million parameters: stages A and C."""
    quick: dict[str, Any] = {
        "store": store, "seq_len": 256, "batch_size": 2, "heldout_tokens": 2048, "checkpoint_every": 20,
        "transfer": StageConfig(max_seconds=120.0, lr=3e-3),
        "tune": StageConfig(max_seconds=180.0, lr=5e-4, trainable=(LORA,)),
    }  # fmt: skip
    return StagesConfig(**(quick | changes))


def gpu_stages(store: str, **changes: Any) -> StagesConfig:
    """Twenty minutes on one GPU: all stages, bfloat16, activations computed again."""
    long: dict[str, Any] = {
        "store": store, "seq_len": 2048, "batch_size": 16, "micro_batch_size": 4, "heldout_tokens": 65536,
        "precision": "bfloat16", "activation_checkpointing": True, "checkpoint_every": 200,
        "transfer": StageConfig(max_seconds=300.0, lr=3e-3),
        "distill": StageConfig(max_seconds=300.0, lr=5e-4, trainable=(LORA,)),
        "tune": StageConfig(max_seconds=600.0, lr=3e-4, trainable=(LORA,)),
    }  # fmt: skip
    return StagesConfig(**(long | changes))


def convert_stages(model: Any, out: str | Path, config: StagesConfig, *, quiet: bool = False) -> StagesResult:
    """Train a titanized model through the stages of `config`, in out/a-transfer, out/b-distill and out/c-lora.

    model: a Model or something around one; it stays as it is. Called again, finished stages are read instead of run,
    and an interrupted one goes on. Raises ValueError if a folder holds a stage of other settings or another model.
    """
    current = copy.deepcopy(find_model(model))
    if config.mag_weight is not None:
        set_mag_weight(current, config.mag_weight)
    results: dict[str, dict[str, Any]] = {}
    for name, stage in config.stages.items():
        if not stage.wanted:
            continue
        folder = Path(out) / name
        results[name] = _run(folder, _with_rates(stage_config(config, name), config, current), current, quiet)
        if results[name]["stopped"] not in ("", "time"):
            return StagesResult(model=None, stopped=results[name]["stopped"], stages=results)
        current = load(folder / "model")
    return StagesResult(model=current, stopped="", stages=results)


def control(model: Any, out: str | Path, config: StagesConfig, *, quiet: bool = False) -> StagesResult:
    """Stage C on the backbone alone, in out/control: no memory, the same adapters, data, order, seed, rate and steps.

    Where stage C in `out` has ended, by its steps or by the clock, the control makes as many steps as it did.
    """
    tuned = stage_config(config, TUNE)
    done = Path(out) / TUNE / RESULT
    steps = json.loads(done.read_text())["step"] if done.is_file() else 0
    if steps:
        warmup = dataclasses.replace(tuned.schedule, warmup_steps=min(tuned.schedule.warmup_steps, steps))
        tuned = dataclasses.replace(tuned, steps=steps, max_seconds=0.0, schedule=warmup)
    adapters = dataclasses.replace(tuned.lora, train_memory=False)
    tuned = dataclasses.replace(tuned, mag=None, trainable=(LORA,), lora=adapters)
    folder = Path(out) / CONTROL
    result = _run(folder, tuned, plain_backbone(model), quiet)
    finished = result["stopped"] in ("", "time")
    model_there = load(folder / "model") if finished else None
    return StagesResult(model=model_there, stopped="" if finished else result["stopped"], stages={CONTROL: result})


def plain_backbone(model: Any) -> Model:
    """A copy of the model without linear branches and In-Place memories."""
    return copy.deepcopy(drop_memory(model))


def stage_config(config: StagesConfig, name: str) -> TrainConfig:
    """The run that the stage `name` is."""
    stage = config.stages[name]
    steps = stage.steps or TIMED_STEPS
    objective = {
        TRANSFER: ObjectiveConfig(kind="transfer", cosine=config.cosine),
        DISTILL: ObjectiveConfig(kind="distill", temperature=config.temperature, alpha=config.alpha),
        TUNE: ObjectiveConfig(),
    }[name]
    mag = None
    if stage.mag_start is not None and config.mag_weight is not None:
        mag = MagSchedule(kind="linear", initial=stage.mag_start, final=config.mag_weight, steps=max(1, steps // 2))
    return TrainConfig(
        data=DataConfig(
            store=config.store, view=config.view, seq_len=config.seq_len, batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
        ),
        optimizer=OptimizerConfig(lr=stage.lr, weight_decay=0.0),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=min(WARMUP_STEPS, steps // 10)),
        objective=objective,
        trainable=stage.trainable,
        lora=config.lora if LORA in stage.trainable else LoraConfig(),
        mag=mag,
        log=LogConfig(
            before_after=True, heldout_tokens=config.heldout_tokens, checkpoint_every=config.checkpoint_every,
            keep_checkpoints=1,
        ),
        steps=steps,
        max_seconds=stage.max_seconds,
        seed=config.seed,
        precision=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile and name != TRANSFER,
        device=config.device,
    )  # fmt: skip


def _with_rates(run: TrainConfig, config: StagesConfig, model: Model) -> TrainConfig:
    """`run` with the rates of what a conversion added to `model`, as far as it is trained."""
    if run.objective.kind == "transfer" or (LORA in run.trainable and not run.lora.train_memory):
        return run
    factors: dict[str, float] = {}
    if any(mixer.config.mag == "learned" for mixer in liza_layers(model).values()):
        factors["*.mag"] = config.mag_rate
    if LORA in run.trainable and any(".memory." in name for name in memory_parameters(model)):
        factors["*.memory.*"] = config.memory_rate
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr_factors=factors))


def _run(folder: Path, config: TrainConfig, model: Model, quiet: bool) -> dict[str, Any]:
    """Run, resume, or read what has finished."""
    begun = folders.latest(folder) is not None
    if begun:
        check_same_run(config, folder)
        same = read_record(folder).get("base") == weights_checksum(model)
        require(same, f"{folder} was trained from other weights. Delete it, or choose another folder.")
    finished = folder / RESULT
    _say(
        f"{folder.name}: {'finished before' if begun and finished.is_file() else 'resumed' if begun else 'starts'}",
        quiet,
    )
    if begun and finished.is_file():
        return json.loads(finished.read_text())
    return train(config, folder, resume=begun, model=None if begun else model, quiet=quiet).to_dict()


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)
