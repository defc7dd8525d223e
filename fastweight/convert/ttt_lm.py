"""ttt-lm: folders of the published PyTorch code, config.json and safetensors (test-time-training/ttt-lm-pytorch)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastweight import files
from fastweight.configs import require
from fastweight.convert.base import Format, keep_source, read_json, source_of
from fastweight.convert.folders import WEIGHTS, check_number, read_weights, same_bytes
from fastweight.convert.ttt_names import Settings, fill, spread
from fastweight.model import Model

NAME = "ttt-lm"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Our setting → (key of config.json, value where the key is absent; None: it must be there). A folder that transformers
# wrote leaves out what equals the library's default, which is how tied embeddings usually come.
KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", None),
    "d_model": ("hidden_size", None),
    "hidden": ("intermediate_size", None),
    "num_layers": ("num_hidden_layers", None),
    "num_heads": ("num_attention_heads", None),
    "mini_batch_size": ("mini_batch_size", 16),
    "base_lr": ("ttt_base_lr", 1.0),
    "mlp": ("ttt_layer_type", "linear"),
    "share_qk": ("share_qk", False),
    "gate": ("use_gate", False),
    "pre_conv": ("pre_conv", False),
    "conv_width": ("conv_kernel", 4),
    "rope_base": ("rope_theta", 10000.0),
    "rms_norm_eps": ("rms_norm_eps", 1e-6),
    "init_std": ("initializer_range", 0.02),
    "tied": ("tie_word_embeddings", True),
}
FIXED = {"model_type": "ttt", "hidden_act": "silu"}


def read(src: Path, config: Path | None) -> Model:
    """The model in the folder `src`; `config` replaces its config.json."""
    require(src.is_dir(), f"{src} is not a folder. A {NAME} checkpoint is a folder with config.json and safetensors.")
    path = src / "config.json" if config is None else config
    data = read_json(path, "the settings of a TTT model (hidden_size, ttt_layer_type, ...)")
    settings = to_settings(data, str(path))
    found = read_weights(src)
    head_stored = HEAD in found
    if settings.tied and head_stored:
        embedding, head = found.get(EMBEDDING), found.pop(HEAD)
        same = embedding is not None and same_bytes(head, embedding)
        require(same, f"{src}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true.")
    model = fill(settings.to_config(), str(src), found, jax=False)
    return keep_source(model, NAME, {"config": data, "head_stored": head_stored})


def write(model: Model, dst: Path) -> None:
    """Write config.json and model.safetensors into `dst`."""
    settings, source = Settings.of(model.config, NAME), source_of(model, NAME)
    weights = {name: tensor.contiguous() for name, tensor in spread(model, jax=False).items()}
    if settings.tied and source.get("head_stored", False):
        weights[HEAD] = weights[EMBEDDING].clone()
    files.write_atomically(dst / WEIGHTS, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    text = json.dumps(_to_json(settings, source.get("config"), weights), indent=2, sort_keys=True)
    files.write_text(dst / "config.json", text + "\n")


def to_settings(data: dict[str, Any], source: str) -> Settings:
    """Settings from a config.json. Missing keys, and values of the wrong type or kind, are named."""
    for key, value in FIXED.items():
        got = data.get(key, value)
        require(got == value, f"{source}: {key} is {got!r}; {NAME} checkpoints have {value!r}.")
    missing = [key for key, default in KEYS.values() if default is None and key not in data]
    require(not missing, f"{source}: missing key(s) {', '.join(missing)}.")
    kind = data.get("ttt_layer_type", "linear")
    require(kind in ("linear", "mlp"), f'{source}: ttt_layer_type must be "linear" or "mlp", got {kind!r}.')
    require(
        kind == "linear" or "ttt_base_lr" in data,
        f"{source}: ttt_base_lr is missing. The published code would take 1.0, yet TTT-MLP is trained with 0.1; "
        "add the rate that this model was trained with.",
    )
    values = {ours: data.get(key, default) for ours, (key, default) in KEYS.items()} | {"mlp": kind == "mlp"}
    for ours, value in values.items():
        values[ours] = check_number(f"{source}: {KEYS[ours][0]}", Settings.__annotations__[ours], value)
    return Settings(**values)


def _to_json(settings: Settings, original: dict[str, Any] | None, weights: dict[str, Tensor]) -> dict[str, Any]:
    """The original config.json if it still describes the model; otherwise what this model is, plus its other keys."""
    if original is not None and to_settings(original, "source_config.json") == settings:
        return original
    dtype = str(weights[EMBEDDING].dtype).removeprefix("torch.")
    fresh = {"architectures": ["TTTForCausalLM"], "torch_dtype": dtype, **FIXED}
    fresh |= {key: getattr(settings, ours) for ours, (key, _) in KEYS.items()}
    return (original or {}) | fresh | {"ttt_layer_type": "mlp" if settings.mlp else "linear"}


FORMAT = Format(NAME, read, write, "TTT-Linear and TTT-MLP: folder of the PyTorch code, config.json + safetensors")
