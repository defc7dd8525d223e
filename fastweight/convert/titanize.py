"""Attention layers of a model become LiZA layers, and plain attention again."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastweight.configs import require
from fastweight.convert.base import read_json
from fastweight.convert.layer_choice import Layers, choose_layers
from fastweight.convert.mag import find_model, liza_layers
from fastweight.convert.standing import stand_as
from fastweight.layers import state_dtype
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.liza import LizaConfig
from fastweight.model import Model, load
from fastweight.model_config import BlockConfig, ModelConfig
from fastweight.model_folder import FORMAT as MODEL_FORMAT


def titanize(
    model: Any, *, layers: Layers = "all", mag_weight: float = 0.0, mag: str = "scheduled", window: int | None = None,
    num_sinks: int = 0, positions: str = "none", feature_map: str = "silu", feature_dim: int = 0, gated: bool = True,
    order: int = 1, trick: str = "derivative", conv_width: int = 0, output_norm: str = "none", seed: int = 0,
) -> Model:  # fmt: skip
    """A new Model whose chosen attention layers have a delta-rule memory beside them, mixed in with weight μ.

    model: a Model, anything with `to_model()`, a model folder, or a pretrained folder or hub name. The new Model has
    the same backbone tensors, not copies: what is trained in one changes in the other. Its memories are drawn from
    `seed`; at mag_weight 0 it computes the backbone bit for bit. Training mode, backends and origin are kept.

    layers: "all" (every attention block), a list, "0-5,9", "every 3", "last 4", or a budget: see `choose_layers`.
    window, num_sinks: sliding window and sink tokens of softmax where 0 < μ < 1; a layer whose own window is smaller
    keeps it. The rest: see LizaConfig.
    Raises ValueError for layers that do not exist or are no plain attention, and for settings that do not fit.
    """
    backbone = read_model(model)
    options = {
        "mag_weight": mag_weight, "mag": mag, "positions": positions, "feature_map": feature_map,
        "feature_dim": feature_dim, "gated": gated, "order": order, "trick": trick, "conv_width": conv_width,
        "output_norm": output_norm,
    }  # fmt: skip
    blocks = list(backbone.config.blocks)
    for number in _attention_layers(backbone.config, layers):
        blocks[number] = _with_memory(blocks[number], window, num_sinks, options)
    return _rebuild(backbone, replace(backbone.config, blocks=tuple(blocks)), seed)


def restore_backbone(model: Any) -> Model:
    """The model with plain attention in place of every LiZA layer: the backbone's tensors under its own names.

    The new Model has the same tensors, not copies; the memories are left out.
    """
    titanized = find_model(model)
    blocks = list(titanized.config.blocks)
    for number in liza_layers(titanized):
        mixer = blocks[number].mixer
        own = {field.name: getattr(mixer, field.name) for field in fields(AttentionConfig)}
        blocks[number] = replace(blocks[number], mixer=AttentionConfig(**own))
    return _rebuild(titanized, replace(titanized.config, blocks=tuple(blocks)), 0)


def read_model(source: Any) -> Model:
    """The Model that `source` is, holds, or names: a model folder, a pretrained folder, or a hub name."""
    if not isinstance(source, (str, Path)):
        theirs = isinstance(source, nn.Module) and hasattr(source, "save_pretrained")
        require(
            not theirs or any(isinstance(part, Model) for part in source.modules()),
            f"needs a Model, or a folder or hub name of one, got {type(source).__name__}. Give the name that it was "
            "loaded from, or the folder of its save_pretrained(folder).",
        )
        return find_model(source)
    config = Path(source) / "config.json"
    if config.is_file() and read_json(config, "the settings of a model").get("format") == MODEL_FORMAT:
        return load(source)
    from fastweight.convert.pretrained import load_pretrained

    return load_pretrained(source)


def _attention_layers(config: ModelConfig, layers: Layers) -> tuple[int, ...]:
    """The chosen blocks; refuse those whose mixer is no plain attention."""
    kinds = [block.mixer.kind for block in config.blocks]
    attention = [i for i, kind in enumerate(kinds) if kind == "attention"]
    again = " To convert anew, call restore_backbone first." if "liza" in kinds else ""
    listed = ", ".join(kinds)
    require(bool(attention), f"titanize: this model has no attention layer; its layers are {listed}.{again}")
    chosen = choose_layers(layers, len(kinds), attention)
    other = [f"{i} ({kinds[i]})" for i in chosen if kinds[i] != "attention"]
    require(not other, f"titanize: layer(s) {', '.join(other)} are no attention. Those that are: {attention}.{again}")
    return chosen


def _with_memory(block: BlockConfig, window: int | None, num_sinks: int, options: dict[str, Any]) -> BlockConfig:
    attention = block.mixer
    assert isinstance(attention, AttentionConfig)
    own = {field.name: getattr(attention, field.name) for field in fields(AttentionConfig)}
    if window is not None and attention.window is not None and attention.window <= window:
        window, num_sinks = None, 0
    mixer = LizaConfig(**own, memory_window=window, memory_sinks=num_sinks, **options)
    return replace(block, mixer=mixer)


def _rebuild(model: Model, config: ModelConfig, seed: int) -> Model:
    """A Model of `config` over `model`'s tensors; memories that it does not have are drawn from `seed`."""
    with torch.device("meta"):
        new = Model(config)
    _draw_memories(new, model, seed)
    shared, wanted = dict(model.named_parameters()), dict(new.named_parameters())
    foreign = [name for name in shared if name not in wanted and not _is_memory(model, name)]
    require(
        not foreign and not list(model.buffers()),
        f"this model holds tensors that are not its own: {', '.join(foreign[:4])}. Merge adapters first.",
    )
    packed = [f"{name} ({p.dtype})" for name, p in shared.items() if not p.is_floating_point()]
    require(not packed, f"this model is quantised: {', '.join(packed[:4])}. Load it in a floating-point dtype first.")
    for name in wanted:
        if name in shared:
            old = shared[name]
            _put(new, name, nn.Parameter(old.detach(), requires_grad=old.requires_grad))
    return stand_as(new, model)


def _draw_memories(new: Model, model: Model, seed: int) -> None:
    """Real, initialised memories in the LiZA layers that `model` does not have yet, on its device."""
    fresh = {number: mixer for number, mixer in liza_layers(new).items() if number not in liza_layers(model)}
    wide = state_dtype(model.embedding.weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for mixer in fresh.values():
            mixer.memory.to_empty(device="cpu")
            mixer.mag = nn.Parameter(torch.empty(mixer.mag.shape), requires_grad=mixer.mag.requires_grad)
            mixer.reset_memory(new.config.init_std)
            mixer.memory.to(model.device, wide)
            mixer.mag.data = mixer.mag.data.to(model.device, wide)


def _is_memory(model: Model, name: str) -> bool:
    return any(name.startswith((f"blocks.{i}.mixer.memory.", f"blocks.{i}.mixer.mag")) for i in liza_layers(model))


def _put(model: Model, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
