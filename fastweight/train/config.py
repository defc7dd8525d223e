"""The settings of a run: nested frozen dataclasses with a strict JSON form."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fastweight.configs import check_types, from_nested, require
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.distributed.mesh import MeshConfig, ReplicaConfig
from fastweight.optim import AveragingConfig, OptimizerConfig, ScheduleConfig, schedule_factor
from fastweight.train.loops import LoopConfig
from fastweight.train.rounding import RoundingConfig

Scalar = int | float | bool | str
ViewName = Literal["windows", "bins", "streams", "long"]
Precision = Literal["float32", "bfloat16"]
ObjectiveName = Literal["next-token", "transfer", "distill"]
Student = Literal["linear", "mix"]
Quantization = Literal["none", "nf4"]
ALL, MEMORY, LORA = "all", "memory", "lora"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the model comes from: a preset with new weights, or a model folder with its weights."""

    preset: str = ""
    """Name of a preset (`fastweight presets`)."""
    folder: str = ""
    """A model folder, taken as it is; on the command line also the folder of a run."""
    vocab_size: int = 0
    """Size of the preset's vocabulary; 0: that of the data's tokenizer."""
    changes: dict[str, Scalar] = field(default_factory=dict)
    """Fields of the preset's config that differ, e.g. tie_embeddings True."""

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
    """What is read."""

    store: str = ""
    """Folder of a token store (`fastweight data prepare`)."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further stores, each with its share of the samples, e.g. data/code 0.3; `store` has the rest."""
    weights: str = ""
    """Name of the weights that the tokens of the store have (`fastweight data weigh`); the loss is then weighted."""
    view: ViewName = "windows"
    """windows: documents concatenated and split; bins: whole documents packed; streams: each row of the batch reads its
    own documents, window after window; long: rows from long documents only, never two in a row."""
    seq_len: int = 512
    """Tokens per window, bin or row."""
    align: int = 1
    """View bins: every document begins at a multiple of so many tokens."""
    min_tokens: int = 0
    """View long: the shortest row that is read; 0: seq_len."""
    batch_size: int = 8
    """Sequences per step."""
    micro_batch_size: int = 0
    """Sequences per forward pass, 0 for all of them; gradients are accumulated."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(self.seq_len >= 1, f"data: seq_len must be positive, got {self.seq_len}.")
        require(self.batch_size >= 1, f"data: batch_size must be positive, got {self.batch_size}.")
        require(
            self.align == 1 or (self.view == "bins" and self.align > 1 and self.seq_len % self.align == 0),
            f"data: align belongs to view bins and must divide seq_len {self.seq_len}, got {self.align} with view "
            f"{self.view}.",
        )
        require(
            self.min_tokens == 0 or (self.view == "long" and 0 < self.min_tokens <= self.seq_len),
            f"data: min_tokens belongs to view long and must lie in 1..seq_len {self.seq_len}, got {self.min_tokens} "
            f"with view {self.view}.",
        )
        self._check_mix()
        micro = self.micro_batch_size
        require(
            0 <= micro <= self.batch_size and (micro == 0 or self.batch_size % micro == 0),
            f"data: micro_batch_size must divide batch_size {self.batch_size}, got {micro}.",
        )

    def _check_mix(self) -> None:
        require(
            not self.mix or (min(self.mix.values()) > 0 and sum(self.mix.values()) < 1),
            f"data: mix gives each further store its share of the samples: above 0, together below 1; got {self.mix}.",
        )
        require(self.store not in self.mix, f"data: {self.store} is the store and in mix, too. Name it once.")
        require(
            not self.mix or self.view != "streams",
            "data: mix and view streams cannot go together: streams keep an order of their own. Set another view.",
        )

    @property
    def rows(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class InnerRateWarmup:
    """Warm-up of the layers' base inner learning rate.

    Source: the published TTT-MLP runs (Sun et al. 2024, arXiv:2407.04620), 0.01 → 0.1.
    """

    steps: int = 0
    """Length of the warm-up; 0: none."""
    first_ratio: float = 0.1
    """The rate at the first step, as a part of the layer's own."""

    def __post_init__(self) -> None:
        check_types(self, "inner_rate")
        require(self.steps >= 0, f"inner_rate: steps must not be negative, got {self.steps}.")
        require(0 <= self.first_ratio <= 1, f"inner_rate: first_ratio must lie in [0, 1], got {self.first_ratio}.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What a step makes smaller.

    transfer: in each layer with both branches, the error of the linear branch's heads against those of the softmax
    branch, both read from the frozen backbone's own hidden states (LoLCATs, arXiv:2410.10254, section 3.2).
    distill: KL(backbone ‖ model) over the next token (Hinton et al. 2015, arXiv:1503.02531).
    """

    kind: ObjectiveName = "next-token"
    """next-token: cross-entropy of the text."""
    mse: float = 1.0
    """transfer: weight of the squared error, per token relative to the squared norm of the softmax heads."""
    cosine: float = 0.0
    """transfer: weight of 1 − cosine, a mean over heads."""
    student: Student = "linear"
    """transfer: the linear branch alone, or the layer's mix of its (windowed) softmax and linear branches."""
    temperature: float = 1.0
    """distill: both distributions are softened by it; the loss is multiplied by its square."""
    alpha: float = 0.0
    """distill: part of the cross-entropy of the text in the loss, the rest is the KL."""
    head_weights: tuple[float, ...] = ()
    """next-token, for a model with tokens_ahead: weight of each head's loss in the mean, the next token's first; empty:
    all the same."""

    def __post_init__(self) -> None:
        check_types(self, "objective")
        for name in ("mse", "cosine"):
            require(getattr(self, name) >= 0, f"objective: {name} must not be negative, got {getattr(self, name)}.")
        require(self.mse + self.cosine > 0, "objective: mse and cosine are both 0; nothing would be learned.")
        require(self.temperature > 0, f"objective: temperature must be positive, got {self.temperature}.")
        require(0 <= self.alpha <= 1, f"objective: alpha must lie in [0, 1], got {self.alpha}.")
        heads = self.head_weights
        require(
            not heads or (min(heads) >= 0 and 0 < sum(heads) < math.inf),
            f"objective: head_weights must be finite, not negative and not all 0, got {heads}.",
        )
        require(
            not heads or self.kind == "next-token",
            f'objective: head_weights belongs to kind "next-token", got {self.kind!r}.',
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2022, arXiv:2106.09685), through PEFT. rank 0: none."""

    rank: int = 0
    """Rank of every adapter."""
    alpha: float = 16.0
    """An adapter's product is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Of an adapter's input, in training."""
    targets: tuple[str, ...] = ("qkv", "out")
    """Linear layers that get one, by the end of their names in the model, e.g. "mixer.qkv" or "down"."""
    train_memory: bool = True
    """Also train what the conversion has added."""
    quantize: Quantization = "none"
    """nf4: the frozen target layers in 4 bits (QLoRA, arXiv:2305.14314); needs a GPU and bitsandbytes."""

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(self.rank >= 0, f"lora: rank must not be negative, got {self.rank}.")
        require(self.alpha > 0, f"lora: alpha must be positive, got {self.alpha}.")
        require(0 <= self.dropout < 1, f"lora: dropout must lie in [0, 1), got {self.dropout}.")
        require(bool(self.targets), "lora: targets is empty; name at least one layer.")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported and kept; nothing here changes the weights."""

    every: int = 10
    """Steps between lines of metrics.jsonl."""
    stats_every: int = 0
    """Steps between inner-loop statistics; 0: never."""
    stats_tokens: int = 512
    """Tokens that one such measurement reads."""
    heldout_every: int = 0
    """Steps between held-out losses; 0: never."""
    heldout_tokens: int = 65536
    """Tokens of one held-out loss, at least one window."""
    before_after: bool = False
    """Held-out losses before the first step and after the last."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only the first and the last."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    tensorboard: bool = False
    """Also write TensorBoard files."""
    wandb: bool = False
    """Also send the numbers to Weights & Biases."""
    wandb_project: str = "fastweight"
    """Its project."""

    def __post_init__(self) -> None:
        check_types(self, "log")
        for name in ("every", "stats_tokens", "heldout_tokens", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"log: {name} must be at least 1, got {getattr(self, name)}.")
        for name in ("stats_every", "heldout_every", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"log: {name} must not be negative, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    inner_rate: InnerRateWarmup = field(default_factory=InnerRateWarmup)
    loops: LoopConfig = field(default_factory=LoopConfig)
    rounding: RoundingConfig = field(default_factory=RoundingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainable: tuple[str, ...] = (ALL,)
    """Which parameters learn: all; memory (what a conversion has added); lora (adapters, and the memory if
    lora.train_memory); or patterns of names ("*.feed_forward.*"). The others stay as they are, bit for bit."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    mag: MagSchedule | None = None
    """How the weight of the linear branches moves over the run; None leaves it as it is."""
    log: LogConfig = field(default_factory=LogConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    steps: int = 1000
    """Updates of the weights."""
    max_seconds: float = 0.0
    """End cleanly after this training time, 0 for no limit. The decay of the learning rate then follows the clock too,
    so two runs are not bit-equal."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    max_bad_steps: int = 10
    """Steps with a loss or gradient that is not finite are skipped; so many in a row end the run."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    precision: Precision = "float32"
    """bfloat16: forward passes under autocast; parameters stay float32."""
    activation_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""
    feed_forward_checkpointing: bool = False
    """The same for the feed-forwards alone: less memory saved, and far less to compute again."""
    compile: bool = False
    """Compile each block with torch.compile."""
    carry_state: bool = False
    """With view streams: a document's memory goes on from window to window; gradients stop at the window's start."""
    device: str = "auto"
    """auto: a GPU if there is one. Else cpu, cuda or cuda:N."""

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
        levels = set() if self.mag is None else self.mag.levels()
        require(
            not (self.carry_state and len(levels) > 1 and levels & {0.0, 1.0}),
            "train: carry_state and a mag schedule that reaches 0 or 1 cannot go together: at these ends a layer keeps "
            "no memory or no keys to go on from. Let the schedule stay between them, or leave carry_state out.",
        )
        require(
            not (self.activation_checkpointing and self.feed_forward_checkpointing),
            "train: activation_checkpointing computes whole blocks again, their feed-forwards too. Set one of it and "
            "feed_forward_checkpointing.",
        )
        require(
            not (self.compile and self.inner_rate.steps),
            "train: compile and inner_rate.steps cannot go together: the rate would be compiled anew every step.",
        )
        require(
            not (self.compile and self.rounding.mode != "none"),
            "train: compile and rounding cannot go together: rounding changes the layers that were compiled. Set "
            "compile to False.",
        )
        require(
            not (self.carry_state and self.loops.moves),
            "train: carry_state needs the same loops in every step (a state belongs to its order). Set "
            "loops.sample_min and loops.on_at to 0.",
        )
        self._check_objective()
        self._check_trainable()
        self._check_averaging()
        decay_steps = self.schedule.decay_steps or round(self.schedule.decay_fraction * self.steps)
        beyond = self.schedule.warmup_steps + decay_steps
        require(
            bool(self.max_seconds) or beyond <= self.steps,
            f"train: warm-up and decay take {beyond} steps, the run has {self.steps}. "
            "Lower schedule.warmup_steps and schedule.decay_steps (or decay_fraction).",
        )

    @property
    def partial(self) -> bool:
        """Some parameters stay frozen, so that a checkpoint holds the others alone."""
        return self.trainable != (ALL,)

    def _check_objective(self) -> None:
        kind = self.objective.kind
        require(
            kind == "next-token" or not self.carry_state,
            f'train: carry_state goes with objective "next-token" alone, got {kind!r}.',
        )
        require(
            kind == "next-token" or not self.data.weights,
            f'train: data.weights weigh the loss of objective "next-token", got {kind!r}. Leave data.weights empty.',
        )
        require(
            kind == "next-token" or ALL not in self.trainable,
            f"train: objective {kind!r} learns from the frozen backbone, but trainable {ALL!r} would change it. "
            f'Set trainable to ("{MEMORY}",) or ("{LORA}",).',
        )
        require(
            kind != "transfer" or LORA not in self.trainable,
            'train: objective "transfer" trains no adapters: they would change the layer that is learned from.',
        )
        require(
            kind != "transfer" or not self.compile,
            'train: compile and objective "transfer" cannot go together: layers are trained one by one.',
        )
        require(
            kind != "transfer" or not self.loops.moves,
            'train: objective "transfer" reports an error per visit, so loops must stay the same. Set '
            "loops.sample_min and loops.on_at to 0.",
        )

    def _check_averaging(self) -> None:
        fraction = 1.0 if self.max_seconds else None
        last = schedule_factor(self.schedule, self.steps - 1, self.steps, self.optimizer.lr, fraction)
        averaging = self.averaging
        require(
            averaging.kind != "swa" or last < averaging.start_factor,
            f'averaging: "swa" starts when the rate is below {averaging.start_factor:g} of its peak, but it ends at '
            f"{last:g}. Raise averaging.start_factor, or lower schedule.final_ratio.",
        )

    def _check_trainable(self) -> None:
        require(bool(self.trainable), f'train: trainable is empty. Name "{ALL}", "{MEMORY}", "{LORA}" or patterns.')
        require(ALL not in self.trainable or not self.partial, f"train: {ALL!r} leaves no room for more trainables.")
        require(
            LORA not in self.trainable or self.lora.rank > 0,
            f"train: trainable {LORA!r} needs adapters, lora.rank is 0. Set lora.rank, e.g. to 16.",
        )
        require(
            LORA in self.trainable or self.lora.rank == 0,
            f'train: lora.rank is {self.lora.rank}, but no adapter would be trained. Set trainable to ("{LORA}",).',
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> "TrainConfig":
        """Read the JSON form. Raises ValueError naming unknown keys, with near names, and values of a wrong type."""
        return from_nested(TrainConfig, data, "train")
