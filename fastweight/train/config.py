"""The settings of a run: nested frozen dataclasses with a strict JSON form."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from fastweight.configs import check_keys, check_types, require
from fastweight.optim import OptimizerConfig, ScheduleConfig

Scalar = int | float | bool | str
ViewName = Literal["windows", "bins", "streams"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the model comes from.

    One of preset: a preset's name; new weights are drawn; or folder: a model folder; training starts from its weights.
    changes: fields of the preset's config that differ (e.g. tie_embeddings). vocab_size: 0 takes that of the data's
    tokenizer.
    """

    preset: str = ""
    folder: str = ""
    vocab_size: int = 0
    changes: dict[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(
            not (self.preset and self.folder),
            f"model: preset {self.preset!r} and folder {self.folder!r} are both given; give one of them.",
        )
        require(self.vocab_size >= 0, f"model: vocab_size must not be negative, got {self.vocab_size}.")
        fixed = self.folder and (self.changes or self.vocab_size)
        require(not fixed, "model: changes and vocab_size apply to a preset; a model folder is taken as it is.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read.

    store: folder of a token store. view: "windows" (documents concatenated and split), "bins" (whole documents packed
    with cu_seqlens) or "streams" (documents window after window, one per lane). seq_len: tokens per window or bin.
    batch_size: sequences per step. micro_batch_size: sequences per forward pass, 0 for all; gradients are accumulated.
    """

    store: str = ""
    view: ViewName = "windows"
    seq_len: int = 512
    batch_size: int = 8
    micro_batch_size: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(self.seq_len >= 1, f"data: seq_len must be positive, got {self.seq_len}.")
        require(self.batch_size >= 1, f"data: batch_size must be positive, got {self.batch_size}.")
        micro = self.micro_batch_size
        require(
            0 <= micro <= self.batch_size and (micro == 0 or self.batch_size % micro == 0),
            f"data: micro_batch_size must divide batch_size {self.batch_size}, got {micro}.",
        )

    @property
    def rows(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class InnerRateWarmup:
    """Warm-up of the layers' base inner learning rate over the first `steps` steps, from `first_ratio` times its value.

    steps 0: off. Source: the published TTT-MLP recipe (Sun et al. 2024, arXiv:2407.04620), 0.01 → 0.1.
    """

    steps: int = 0
    first_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "inner_rate")
        require(self.steps >= 0, f"inner_rate: steps must not be negative, got {self.steps}.")
        require(0 <= self.first_ratio <= 1, f"inner_rate: first_ratio must lie in [0, 1], got {self.first_ratio}.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported and kept; none of it changes the weights.

    every: steps between lines of metrics.jsonl. stats_every: steps between inner-loop statistics, 0 for never.
    heldout_every: steps between held-out losses, 0 for never; heldout_tokens: tokens of one (at least one window).
    checkpoint_every: steps between checkpoints, 0 for only at the end; keep_checkpoints: how many of the newest stay.
    """

    every: int = 10
    stats_every: int = 0
    stats_tokens: int = 512
    heldout_every: int = 0
    heldout_tokens: int = 65536
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "fastweight"

    def __post_init__(self) -> None:
        check_types(self, "log")
        for name in ("every", "stats_tokens", "heldout_tokens", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"log: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("stats_every", "heldout_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"log: {name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run.

    steps: updates. clip_norm: largest global gradient norm, 0 for no clipping. max_bad_steps: steps with a loss or
    gradient that is not finite are skipped; so many in a row end the run. max_seconds: end cleanly after this training
    time, 0 for no limit; the decay of the learning rate then follows the clock, so two runs are not bit-equal.
    precision: "bfloat16" runs under autocast, parameters stay float32. carry_state: with view "streams", a document's
    memory goes on from window to window; gradients stop at the window's start.
    device: "auto" takes a GPU if there is one.
    """

    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    inner_rate: InnerRateWarmup = field(default_factory=InnerRateWarmup)
    log: LogConfig = field(default_factory=LogConfig)
    steps: int = 1000
    max_seconds: float = 0.0
    clip_norm: float = 1.0
    max_bad_steps: int = 10
    seed: int = 0
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    carry_state: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        check_types(self, "train")
        require(self.steps >= 1, f"train: steps must be at least 1, got {self.steps}.")
        require(self.max_seconds >= 0, f"train: max_seconds must not be negative, got {self.max_seconds}.")
        require(self.clip_norm >= 0, f"train: clip_norm must not be negative, got {self.clip_norm}.")
        require(self.max_bad_steps >= 1, f"train: max_bad_steps must be at least 1, got {self.max_bad_steps}.")
        view = self.data.view
        require(
            not self.carry_state or view == "streams",
            f'train: carry_state needs data.view "streams" (consecutive windows of a document), got {view!r}.',
        )
        require(
            not (self.compile and self.inner_rate.steps),
            "train: compile and inner_rate.steps cannot go together: the rate would be compiled anew every step.",
        )
        beyond = self.schedule.warmup_steps + self.schedule.decay_steps
        require(
            bool(self.max_seconds) or beyond <= self.steps,
            f"train: warm-up and decay take {beyond} steps, the run has {self.steps}. Shorten them (schedule.*).",
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> "TrainConfig":
        """Read the JSON form. Raises ValueError naming unknown keys, with near names, and values of a wrong type."""
        return _from_dict(TrainConfig, data, "train")


def _from_dict(cls: type, data: Any, owner: str) -> Any:
    require(isinstance(data, dict), f"{owner}: expected an object with keys, got {type(data).__name__}.")
    hints = get_type_hints(cls)
    check_keys(owner, data, hints)
    values = {}
    for key, value in data.items():
        if dataclasses.is_dataclass(hints[key]):
            value = _from_dict(typing.cast(type, hints[key]), value, key)
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
