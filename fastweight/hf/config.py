"""ModelConfig as a Hugging Face config, and the file that leads from a saved folder to this library."""

from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fastweight import files
from fastweight.configs import require
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig

CODE = '''"""Leads `trust_remote_code=True` to the installed library (pip install "fastweight[hf]")."""

from {module} import {config}, {model}

__all__ = ["{config}", "{model}"]
'''


class FastweightConfig(PreTrainedConfig):
    """The config of any model of the library.

    model: a ModelConfig or its JSON form; None for a small gated delta rule over bytes.
    use_cache: return the state from `forward` outside training, unless the call says otherwise.
    origin: where pretrained weights came from (`Model.origin`), a JSON object. The token ids that its config names as
    first, last and padding are this config's, unless given.
    The sizes that other programs look for (vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings) are
    derived from `model`; a value that contradicts it is refused. Other keywords are those of PreTrainedConfig.
    """

    model_type: ClassVar[str] = "fastweight"
    code: ClassVar[tuple[str, str]] = ("fastweight.hf", "FastweightForCausalLM")  # module and class of the model
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self, model: ModelConfig | dict[str, Any] | None = None, use_cache: bool = True,
        origin: dict[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        config = _default() if model is None else model
        config = ModelConfig.from_dict(config) if isinstance(config, dict) else config
        require(
            isinstance(config, ModelConfig),
            f"FastweightConfig: model must be a ModelConfig or its JSON form, got {type(config).__name__}.",
        )
        require(
            origin is None or isinstance(origin, dict),
            f"FastweightConfig: origin must be a JSON object or None, got {type(origin).__name__}.",
        )
        for name, size in _sizes(config).items():
            _check_size(name, kwargs.pop(name, size), size)
        kwargs.pop("auto_map", None)
        options: dict[str, Any] = {"architectures": [self.code[1]]} | _token_ids(origin) | kwargs
        super().__init__(**options)
        self.use_cache, self.origin = use_cache, origin
        own, (_, model_class) = f"modeling_{self.model_type}", self.code
        self.auto_map = {
            "AutoConfig": f"{own}.{type(self).__name__}",
            "AutoModelForCausalLM": f"{own}.{model_class}",
        }
        self.set_model(config)

    def set_model(self, config: ModelConfig) -> None:
        """Describe another model, with all sizes derived from it."""
        self.model = config.to_dict()
        for name, size in _sizes(config).items():
            setattr(self, name, size)

    def describe(self, model: Model) -> None:
        """Describe `model`: its config, its origin, and its origin's special tokens where this config has none."""
        self.set_model(model.config)
        self.origin = model.origin
        for name, number in _token_ids(model.origin).items():
            if getattr(self, name, None) is None:
                setattr(self, name, number)

    def to_model_config(self) -> ModelConfig:
        """The library's own config. Raises ValueError if a size was set to another value meanwhile, as by a keyword of
        `from_pretrained`."""
        config = ModelConfig.from_dict(self.model)
        for name, size in _sizes(config).items():
            _check_size(name, getattr(self, name), size)
        return config

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json and the file that `auto_map` names."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        module, model_class = self.code
        code = CODE.format(module=module, config=type(self).__name__, model=model_class)
        files.write_text(folder / f"modeling_{self.model_type}.py", code)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: every folder carries the same `auto_map`, and this library's code is never copied into it."""


def _token_ids(origin: dict[str, Any] | None) -> dict[str, Any]:
    # What generation_config.json says counts: models that were taught to talk end their turns with further tokens.
    parts = [(origin or {}).get(part) for part in ("config", "generation")]
    source = {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: source[name] for name in names if source.get(name) is not None}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.visits),
        "tie_word_embeddings": config.tie_embeddings,
    }


def _check_size(name: str, given: Any, size: Any) -> None:
    require(
        given == size,
        f"FastweightConfig: {name} is {given!r}, but `model` says {size!r}. Change `model`, not {name}.",
    )


def _default() -> ModelConfig:
    mixer = DeltaConfig(num_heads=2, head_dim=32, gated=True)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=128))
    return ModelConfig(vocab_size=257, d_model=64, blocks=(block, block))
