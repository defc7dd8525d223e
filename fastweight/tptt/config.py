"""TPTT's config, as a Hugging Face config of a converted model."""

import json
from enum import Enum
from typing import Any, ClassVar

from fastweight.configs import require
from fastweight.convert.layer_choice import Layers
from fastweight.hf.config import FastweightConfig
from fastweight.model_config import ModelConfig
from fastweight.tptt import options

BASE_MODEL = "meta-llama/Llama-3.2-1B"
DERIVED = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")


class TpttConfig(FastweightConfig):
    """Which pretrained model is converted, and how. Building one needs no network and reads no file.

    base_model_name: a folder, a hub name or a .gguf file. lora_config: the dict of a peft LoraConfig (or the object),
    None to train all weights. operator_mode: a preset, or order, alpha_gate, beta_gate, linear and trick. mag_weight:
    initial μ. max_self_attn_length: sliding window of softmax where 0 < μ < 1. layers: which attention layers, as in
    `titanize`. model: the ModelConfig after the conversion, set by TpttModel; a config that has it builds that model
    and does not read base_model_name again.
    max_chunk_size and padding_side are taken and change nothing: results do not depend on chunks or on padding.
    Raises ValueError for illegal values, and by name for options of TPTT that have no meaning here.
    """

    model_type: ClassVar[str] = "tptt"
    code: ClassVar[tuple[str, str]] = ("fastweight.tptt", "TpttModel")

    def __init__(
        self, *, base_model_name: str = BASE_MODEL, lora_config: Any = None, operator_mode: str | None = None,
        order: int | None = None, alpha_gate: str | None = None, beta_gate: str | None = None,
        linear: bool | None = None, trick: str | None = None, mag_weight: float = 0.5,
        max_self_attn_length: int | None = None, layers: Layers = "all", max_chunk_size: int = 64,
        padding_side: str | None = None, target_modules_names: list[str] | None = None,
        attention: str | None = None, model: ModelConfig | dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        options.check_fixed({name: kwargs.pop(name) for name in options.FIXED if name in kwargs})
        options.check_targets(target_modules_names)
        options.check_attention(attention)
        options.check_unused(max_chunk_size, padding_side)
        options.check_layers(layers)
        require(isinstance(base_model_name, str), f"TPTT: base_model_name must be a text, got {base_model_name!r}.")
        number = isinstance(mag_weight, (int, float)) and not isinstance(mag_weight, bool)
        require(number and 0 <= mag_weight <= 1, f"TPTT: mag_weight must be in [0, 1], got {mag_weight!r}.")
        window = max_self_attn_length
        good = window is None or (isinstance(window, int) and not isinstance(window, bool) and window > 0)
        require(good, f"TPTT: max_self_attn_length must be a positive number of tokens or None, got {window!r}.")
        super().__init__(model=model, **kwargs)
        if model is None:
            self._describe_nothing()
        self.base_model_name, self.lora_config = base_model_name, plain_lora(lora_config)
        self.operator_mode, self.order, self.trick = operator_mode, order, trick
        self.alpha_gate, self.beta_gate, self.linear = alpha_gate, beta_gate, linear
        self.mag_weight, self.max_self_attn_length = mag_weight, max_self_attn_length
        self.layers = list(layers) if isinstance(layers, tuple) else layers
        self.max_chunk_size, self.padding_side, self.attention = max_chunk_size, padding_side, attention
        self.titanize_options()

    def titanize_options(self) -> dict[str, Any]:
        """The keywords of `titanize` that this config means."""
        operator = options.operator_options(
            self.operator_mode, self.order, self.alpha_gate, self.beta_gate, self.linear, self.trick
        )
        more = {"layers": self.layers, "mag_weight": float(self.mag_weight), "window": self.max_self_attn_length}
        return operator | more

    def to_model_config(self) -> ModelConfig:
        """The library's config of the converted model. Raises ValueError before the conversion."""
        require(self.model is not None, "this TpttConfig describes no model yet: TpttModel(config) converts one.")
        return super().to_model_config()

    def _describe_nothing(self) -> None:
        self.model = None
        for name in DERIVED:
            self.__dict__.pop(name, None)


def plain_lora(lora_config: Any) -> dict[str, Any] | None:
    """The settings of a peft LoraConfig, or of its dict, as JSON values, without None and the version."""
    if lora_config is None:
        return None
    data = lora_config.to_dict() if hasattr(lora_config, "to_dict") else lora_config
    require(
        isinstance(data, dict),
        f"lora_config must be LoraConfig(...).to_dict() or None, got {type(lora_config).__name__}.",
    )
    plain = {key: _plain(value) for key, value in data.items() if value not in (None, {}) and key != "peft_version"}
    kind = plain.get("peft_type", "LORA")
    require(kind == "LORA", f"lora_config: only LoRA adapters are supported, got peft_type {kind!r}.")
    try:
        return json.loads(json.dumps(plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lora_config must hold JSON values only ({error}). Give LoraConfig(...).to_dict()."
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value
