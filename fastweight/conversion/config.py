"""The settings of a conversion."""

from dataclasses import dataclass, field
from typing import Literal

from fastweight.configs import check_types, require
from fastweight.layers import InPlaceConfig
from fastweight.report import ReportSettings
from fastweight.train.config import LORA
from fastweight.train.stages import StagesConfig

Recipe = Literal["mag", "in-place"]


@dataclass(frozen=True, kw_only=True)
class MagConfig:
    """A delta-rule memory beside softmax attention (LiZA), mixed in with weight μ (Memory as Gate)."""

    layers: str = "all"
    """Which attention layers: all, numbers of blocks from 0 ("4", "0-5,9"), "every 3" or "last 4"."""
    mag_weight: float = 0.05
    """μ at the start: 0 is the backbone, 1 the memory alone."""
    mag: Literal["scheduled", "learned"] = "learned"
    """learned: μ of each head is trained. scheduled: it moves as the stages say."""
    window: int = 1024
    """Tokens that softmax still sees where 0 < μ < 1; 0: all that the backbone's does, and its cache grows."""
    num_sinks: int = 4
    """First tokens that stay visible behind the window."""
    positions: Literal["none", "rope"] = "none"
    """Whether the memory sees rotated queries and keys."""
    feature_map: Literal["silu", "identity", "softmax", "hedgehog"] = "hedgehog"
    """What the memory's queries and keys go through before their length is made 1."""
    feature_dim: int = 0
    """Features per head of hedgehog; 0: twice the head's channels."""
    gated: bool = True
    """A learned decay per token and key head; without it the memory only overwrites."""
    order: int = 1
    """Writes per token."""
    trick: Literal["derivative", "rotative", "combined"] = "derivative"
    """What the further writes of an order above 1 hold."""
    conv_width: int = 4
    """Width of a causal convolution on the memory's queries, keys and values, 0 for none."""
    output_norm: Literal["none", "rms"] = "none"
    """rms: the memory's answer is normalised per head."""

    def __post_init__(self) -> None:
        check_types(self, "mag")


@dataclass(frozen=True, kw_only=True)
class InPlaceRecipe(InPlaceConfig):
    """The down-projections of the feed-forwards learn while they read (In-Place memory).

    chunk_size: tokens per update; less than stages.seq_len, or the stages never read the memory. inner_lr: size of an
    update. target: what is stored, "hidden" for pretrained models. projection: values go through a learned matrix.
    max_norm: bound of the memory relative to the down-projection, None for none.
    """

    chunk_size: int = 128
    layers: str = "every 6"
    """Which blocks: all, their numbers from 0 ("4", "0-5,9"), "every 3" or "last 4"."""


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """Everything that shapes a conversion.

    source: a folder, a hub name, or a .gguf file (gguf_file: its name within folder or hub name). data: a token store
    made with the model's tokenizer, or a source of text that is prepared here, heldout_fraction of it kept aside.
    stages: its `store` is set from `data`. control: also train the adapters alone, for the report; left out where stage
    C trains none. report: None ends without one.
    """

    source: str
    data: str
    gguf_file: str = ""
    recipe: Recipe = "mag"
    mag: MagConfig = field(default_factory=MagConfig)
    in_place: InPlaceRecipe = field(default_factory=InPlaceRecipe)
    heldout_fraction: float = 0.05
    stages: StagesConfig
    control: bool = True
    report: ReportSettings | None = field(default_factory=ReportSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        transfers = self.stages.transfer.wanted
        require(
            self.recipe == "mag" or not transfers,
            "convert: stage A teaches linear branches, which recipe 'in-place' does not have. Leave stages.transfer "
            "without steps and max_seconds.",
        )

    @property
    def has_control(self) -> bool:
        """Whether stage C is also run on the backbone alone."""
        tune = self.stages.tune
        return self.control and tune.wanted and LORA in tune.trainable
