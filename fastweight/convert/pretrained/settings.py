"""Reading a Hugging Face config.json: every setting with its type, unsupported values refused by name."""

from collections.abc import Callable
from typing import Any

from fastweight.configs import near_names, require
from fastweight.convert.folders import check_number

# Settings of related families that change what a decoder computes; no family here knows them, so they must be off.
FOREIGN = (
    "add_cross_attention", "attention_multiplier", "clip_qkv", "embedding_multiplier", "is_encoder_decoder",
    "logits_scaling", "num_experts", "num_local_experts", "residual_multiplier", "use_bidirectional_attention",
    "use_mrope", "vision_config",
)  # fmt: skip
# Their activation → our feed-forward, gated and not.
GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu", "gelu_fast": "geglu",
}  # fmt: skip
UNGATED = {
    "gelu": "gelu-exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "relu2": "relu2",
}  # fmt: skip
LAYER_TYPES = ("full_attention", "sliding_attention")
LARGEST = (1 << 31) - 1  # of a size, and
MOST_LAYERS = 10_000  # beyond what any decoder has: a file that says more is damaged, and must not fill the memory


class Settings:
    """A config.json of one family; a missing key or null is the family's default, which the caller gives."""

    def __init__(self, family: str, data: dict[str, Any]):
        self.family, self.data = family, data
        self.off(*FOREIGN)
        require(
            not data.get("quantization_config"),
            f"{family}: quantization_config is set; quantised weights are not read, a conversion needs floats. "
            "Load the model as it was before quantisation, or dequantise it first.",
        )

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._value(key, int, default)
        require(0 < value <= LARGEST, f"{self.family}: {key} must lie in 1..{LARGEST}, got {value}.")
        return value

    def num_layers(self, key: str = "num_hidden_layers", default: int | None = None) -> int:
        """How many blocks there are."""
        count = self.size(key, default)
        require(count <= MOST_LAYERS, f"{self.family}: {key} must be at most {MOST_LAYERS:,}, got {count:,}.")
        return count

    def positive(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.number(key, default)
        require(value > 0, f"{self.family}: {key} must be positive, got {value}.")
        return value

    def number(self, key: str, default: float) -> float:
        """A number."""
        return self._value(key, float, default)

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        return self._value(key, bool, default)

    def optional(self, key: str, wanted: type, default: Any = None) -> Any:
        """A number whose null says something else than its absence: null gives None, absence the default."""
        value = self.data.get(key, default)
        return None if value is None else check_number(f"{self.family}: {key}", wanted, value)

    def off(self, *keys: str) -> None:
        """Refuse each of these settings that is on."""
        for key in keys:
            value = self.data.get(key)
            require(
                value in (None, False, 0, [], {}),
                f"{self.family}: {key} is {value!r}, which is not supported. Models with this setting off can be read.",
            )

    def one_of(self, key: str, known: dict[str, str], default: str) -> str:
        """What `known` has for a named choice."""
        value = self.data.get(key) or default
        good = isinstance(value, str) and value in known
        require(good, f"{self.family}: {key} {value!r} is not supported.{near_names(str(value), known)}")
        return known[value]

    def layer_types(self, num_layers: int, is_sliding: Callable[[int], bool]) -> list[str]:
        """The kind of attention of each layer; is_sliding says it where the file does not."""
        types = self.data.get("layer_types")
        if types is None:
            return [LAYER_TYPES[is_sliding(i)] for i in range(num_layers)]
        require(
            isinstance(types, list) and len(types) == num_layers,
            f"{self.family}: layer_types must list {num_layers} layers, got {types!r}.",
        )
        for kind in types:
            known = kind in LAYER_TYPES
            require(known, f"{self.family}: layer type {kind!r} is not supported.{near_names(str(kind), LAYER_TYPES)}")
        return types

    def windows(self, types: list[str], window: int | None) -> list[int | None]:
        """The window of each layer."""
        sliding = LAYER_TYPES[1] in types
        require(not sliding or window is not None, f"{self.family}: layers slide, but sliding_window is not in use.")
        return [window if kind == LAYER_TYPES[1] else None for kind in types]

    def _value(self, key: str, wanted: type, default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        require(value is not None, f"{self.family}: config.json lacks {key}.")
        return check_number(f"{self.family}: {key}", wanted, value)
