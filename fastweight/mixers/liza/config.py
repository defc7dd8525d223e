"""The settings of a LiZA layer."""

from dataclasses import dataclass

from fastweight.configs import check_types, near_names, require
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.liza.features import FEATURE_MAPS, TRICKS
from fastweight.ops.attention import check_window


@dataclass(frozen=True, kw_only=True)
class LizaConfig(AttentionConfig):
    """Attention with a delta-rule memory beside it. The fields of AttentionConfig describe the backbone's attention.

    mag_weight: initial μ of every head, 0 (attention alone) … 1 (memory alone). mag: "scheduled", μ is set from
    outside, or "learned", μ is a parameter that is trained.
    memory_window, memory_sinks: sliding window and first tokens that softmax keeps wherever 0 < μ < 1; None for the
    backbone's own. At μ = 0 they do not act: the layer is the backbone.
    feature_map: of the memory's queries and keys: "silu", "identity", "softmax" or "hedgehog". feature_dim: of
    "hedgehog", even (0: twice head_dim). positions: the memory sees q and k as projected and normalised ("none") or
    also rotated ("rope").
    gated: a learned decay per token and key head. order: writes per token; trick: what the further ones write,
    "derivative", "rotative" or "combined". conv_width: of a causal convolution on the memory's q, k, v, 0 for none.
    output_norm: "none", or "rms" per head with a learned factor.
    """

    mag_weight: float = 0.0
    mag: str = "scheduled"
    memory_window: int | None = None
    memory_sinks: int = 0
    feature_map: str = "silu"
    feature_dim: int = 0
    positions: str = "none"
    gated: bool = True
    order: int = 1
    trick: str = "derivative"
    conv_width: int = 0
    output_norm: str = "none"

    def __post_init__(self) -> None:
        check_types(self, "liza")
        super().__post_init__()
        choices = {
            "mag": ("scheduled", "learned"),
            "feature_map": FEATURE_MAPS,
            "positions": ("none", "rope"),
            "trick": TRICKS,
            "output_norm": ("none", "rms"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in known, f"liza: unknown {name} {value!r}.{near_names(str(value), known)}")
        require(0 <= self.mag_weight <= 1, f"liza: mag_weight must be in [0, 1], got {self.mag_weight}.")
        require(self.order >= 1, f"liza: order must be at least 1, got {self.order}.")
        require(
            self.conv_width == 0 or self.conv_width >= 2, f"liza: conv_width must be 0 or >= 2, got {self.conv_width}."
        )
        self._check_window()
        self._check_feature_dim()

    def _check_window(self) -> None:
        check_window(self.memory_window, self.memory_sinks)
        require(
            self.memory_window is None or self.window is None or self.memory_window <= self.window,
            f"liza: memory_window {self.memory_window} exceeds the backbone's own window {self.window}. Leave it out.",
        )

    def _check_feature_dim(self) -> None:
        require(
            self.feature_dim == 0 or (self.feature_map == "hedgehog" and self.feature_dim > 0),
            f"liza: feature_dim is of feature_map 'hedgehog' (the others keep head_dim), got {self.feature_dim} with "
            f"{self.feature_map!r}. Leave it 0.",
        )
        require(self.feature_dim % 2 == 0, f"liza: feature_dim must be even, got {self.feature_dim}.")
