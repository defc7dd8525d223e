"""What a contest run is asked for, beside the training run itself."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fastweight.artifact import PackSpec
from fastweight.artifact.fit import MOVED
from fastweight.artifact.spec import GROUPS
from fastweight.configs import check_types, from_nested, near_names, require

LearnerKind = Literal["none", "sgd", "lora", "in-place"]
EvalPrecision = Literal["training", "float32", "bfloat16"]
LEARN_MODES = ("cached", "exact")
CAP_BYTES = 16_000_000
SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The text that GPTQ sees; reading it counts as training."""

    tokens: int = 1 << 20
    """Training tokens that are read for the Hessians, over all ranks; 0: none, weights are rounded to nearest."""
    seconds: float = 14.0
    """Part of the time budget that is kept for it. Where there is a budget, it stops when that is used up."""
    margin: float = 1.0
    """Seconds of the budget that stay unused: training and calibration stop that much earlier."""

    def __post_init__(self) -> None:
        check_types(self, "calibration")
        for name in ("tokens", "seconds", "margin"):
            good = 0 <= getattr(self, name) < math.inf
            require(good, f"calibration: {name} must be finite and not negative, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """How the model becomes a file."""

    cap_bytes: int = CAP_BYTES
    """Bytes that program and file may have together; 0: no cap, the clips of `spec` as they are."""
    spec: PackSpec = field(default_factory=PackSpec)
    groups: tuple[str, ...] = MOVED
    """Groups whose clips may move to meet the cap."""
    program: tuple[str, ...] = ()
    """Files or folders that count as program in place of the scorer, so that the score is not reportable here; by
    default the modules of this library that scoring needs, packed."""
    count_program: bool = True
    """Whether the program counts against the cap; its bytes are reported in any case."""

    def __post_init__(self) -> None:
        check_types(self, "pack")
        require(self.cap_bytes >= 0, f"pack: cap_bytes must not be negative, got {self.cap_bytes}.")
        require(
            self.cap_bytes == 0 or len(self.groups) > 0,
            f"pack: groups is empty; name those whose clips may move to meet the cap, of {', '.join(GROUPS)}, or set "
            "cap_bytes to 0.",
        )
        for name in self.groups:
            require(name in GROUPS, f"pack: unknown group {name!r}.{near_names(name, GROUPS)}")


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How the model is scored: in windows side by side, in sliding windows, and while it learns."""

    split: str = "heldout"
    """Split of the token store."""
    original_bytes: bool = False
    """Count the bytes of the texts as they came, not of the texts as the tokenizer normalises them."""
    seq_len: int = 0
    """Tokens per window; 0: that of the training run."""
    stride: int = 64
    """Targets per sliding window."""
    batch_size: int = 32
    """Windows or documents read side by side."""
    precision: EvalPrecision = "training"
    """float32, bfloat16 (under autocast; losses and sums are float32 and float64 all the same), or as in training."""
    document: bool = False
    """Also score whole documents without learning: what a cached learner reads, so that context and learning are told
    apart."""
    learner: LearnerKind = "in-place"
    """What learns while it is scored (`fastweight eval --help`); none leaves the stage out."""
    learn_modes: tuple[str, ...] = ("cached",)
    """cached reads each token once, exact reads the context again; with both, their difference is reported."""
    learn_rate: float = 0.0
    """0: the learner's own."""
    learn_chunk: int = 0
    """Targets between its steps; 0: the learner's own."""
    learn_rank: int = 0
    """Of lora; 0: its own."""
    learn_epochs: int = 1
    """Of sgd, in exact mode alone: what is read once gives one step."""
    learn_batch_size: int = 0
    """Documents that learn side by side; 0: batch_size."""
    seconds: float = SECONDS
    """Hard limit of each stage from when the model is loaded; 0: none."""
    max_tokens: int = 0
    """Score at most so many tokens; such a score cannot be reported. 0: all."""
    max_documents: int = 0
    """Score at most so many documents; such a score cannot be reported. 0: all."""
    expected_tokens: int = 0
    """Targets that the whole split must have, where that is known; 0: not checked."""
    expected_bytes: int = 0
    """Bytes that the whole split must have, where that is known; 0: not checked."""

    def __post_init__(self) -> None:
        check_types(self, "eval")
        for setting in fields(self):
            value = getattr(self, setting.name)
            good = isinstance(value, (str, tuple, bool)) or 0 <= value < math.inf
            require(good, f"eval: {setting.name} must be finite and not negative, got {value}.")
        for name in ("stride", "batch_size", "learn_epochs"):
            require(getattr(self, name) >= 1, f"eval: {name} must be at least 1, got {getattr(self, name)}.")
        for mode in self.learn_modes:
            require(mode in LEARN_MODES, f"eval: unknown learn_mode {mode!r}.{near_names(mode, LEARN_MODES)}")
        require(len(set(self.learn_modes)) == len(self.learn_modes) > 0, "eval: name each of learn_modes once.")
        require(
            self.learn_epochs == 1 or (self.learner == "sgd" and self.learn_modes == ("exact",)),
            f"eval: {self.learn_epochs} learn_epochs are for learner sgd in mode exact alone, got learner "
            f"{self.learner} and {' and '.join(self.learn_modes)}. What is read once gives one step.",
        )

    @property
    def is_subset(self) -> bool:
        """Whether a part of the split is left out."""
        return bool(self.max_tokens or self.max_documents)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run folder was started with. variant: runs that differ in their seed alone have the same.

    budget_seconds: of training and calibration together, 0 for none.
    """

    variant: str
    budget_seconds: float = 0.0
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)

    def __post_init__(self) -> None:
        check_types(self, "golf")
        require(self.variant != "", "golf: variant must have a name.")
        kept = self.calibration.seconds + self.calibration.margin
        budget = self.budget_seconds
        require(
            budget == 0 or budget > kept,
            f"golf: the budget is {budget:g} s, calibration and margin keep {kept:g} s of it; nothing is left to "
            "train in. Raise the budget, or lower calibration.seconds.",
        )

    @property
    def train_seconds(self) -> float:
        """What is left of the budget for training, 0 for no limit."""
        kept = self.calibration.seconds + self.calibration.margin
        return self.budget_seconds - kept if self.budget_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> "RunSettings":
        return from_nested(RunSettings, data, "golf")
