"""Low-rank adapters in the library's own model, through PEFT; and back to plain weights."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastweight import files
from fastweight.configs import near_names, require, to_json
from fastweight.layers import state_dtype
from fastweight.model import Model
from fastweight.tensor_files import write_tensors
from fastweight.train.config import LoraConfig
from fastweight.train.trainable import MEMORY_NAMES, is_adapter

ADAPTER = "default"
# Where PEFT looks whether layers are quantised, and where a quantised layer keeps the plain one that it stands for.
FOUR_BITS, PLAIN = "is_loaded_in_4bit", "plain_layer"
# Where PEFT looks for the adapters of the model behind the Hugging Face face.
FACE_PREFIX = "base_model.model.model."


def add_adapters(model: Model, config: LoraConfig) -> None:
    """Put an adapter beside every target layer of `model`, which computes the same until the adapter has learned.

    Adapters are float32 or wider whatever the layer's dtype: in bfloat16 most of their updates would round to nothing.
    Raises ValueError for a target that fits no linear layer, and if PEFT is not installed.
    """
    check_adapters(model, config)
    peft = _import_peft()
    targets = target_layers(model, config)
    if config.quantize == "nf4":
        quantize_linears(model, targets)
    peft.inject_adapter_in_model(peft.LoraConfig(**_settings(config), target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(state_dtype(parameter))


def target_layers(model: Model, config: LoraConfig) -> list[str]:
    """The full names of the linear layers that `config.targets` mean; those of a memory are trained whole instead."""
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and not _in_memory(name)]
    chosen: set[str] = set()
    for target in config.targets:
        found = {name for name in linears if name == target or name.endswith("." + target)}
        ends = {name.rpartition(".")[2] for name in linears}
        require(bool(found), f"lora: target {target!r} fits no linear layer.{near_names(target, ends)}")
        chosen |= found
    return [name for name in linears if name in chosen]


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "lora_A") and hasattr(part, "merge")}


@contextlib.contextmanager
def without_adapters(model: nn.Module | None) -> Iterator[None]:
    """Inside, the adapters in `model` (nothing if None) add nothing."""
    layers = [] if model is None else list(adapter_layers(model).values())
    trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # PEFT freezes what it switches off.
        for parameter in trained:
            parameter.requires_grad_()


def merge_and_unload(model: Model) -> Model:
    """Add every adapter to its layer's weight and remove it; the same `model`, plain again.

    Raises ValueError if a layer is quantised: its weight cannot take the adapter's product.
    """
    for name, layer in adapter_layers(model).items():
        plain = type(layer.get_base_layer()) is nn.Linear
        require(plain, f"merge_and_unload: {name} is quantised. Merge into the weights that it was made from.")
        layer.merge(safe_merge=True)
    return remove_adapters(model)


def remove_adapters(model: Model) -> Model:
    """Take every adapter out of `model` and drop what it has learned, unless it was merged before.

    Layers that were quantised for it are plain again.
    """
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer()
        plain = vars(base).get(PLAIN)
        if plain is not None:
            plain.weight.data = plain.weight.data.to(model.device)
        model.set_submodule(name, base if plain is None else plain)
    if hasattr(model, "peft_config"):
        del model.peft_config
    vars(model).pop(FOUR_BITS, None)
    return model


def keep_merged(model: Model, merged: Model) -> None:
    """Let the plain layers that quantised ones in `model` stand for have the weights of `merged`."""
    for name, layer in adapter_layers(model).items():
        plain = vars(layer.get_base_layer())[PLAIN]
        plain.weight.data.copy_(merged.get_parameter(f"{name}.weight").data)


def save_adapter(folder: Path, model: Model, config: LoraConfig, base: str) -> None:
    """Write the adapters as PEFT reads them onto a FastweightForCausalLM of the model in folder `base`."""
    peft = _import_peft()
    named = {_peft_name(name): p for name, p in model.named_parameters() if is_adapter(name)}
    write_tensors(folder / "adapter_model.safetensors", named, {"format": "pt"})
    targets = [f"model.{name}" for name in adapter_layers(model)]
    settings = peft.LoraConfig(**_settings(config), target_modules=targets, task_type="CAUSAL_LM").to_dict()
    settings |= {"base_model_name_or_path": base, "inference_mode": True, "target_modules": targets}
    files.write_text(folder / "adapter_config.json", to_json(settings) + "\n")


def quantize_linears(model: Model, names: list[str]) -> None:
    """Replace frozen linear layers by 4-bit ones (NF4). Needs a GPU and bitsandbytes, else ValueError.

    The packed weights are stored under the name of bfloat16, as layers take a memory's dtype from their weights. The
    plain layers wait on the host for `remove_adapters`.
    """
    bitsandbytes = _import_bitsandbytes(model)
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        options: dict[str, Any] = {"quant_type": "nf4", "quant_storage": torch.bfloat16}
        sizes = (old.in_features, old.out_features, old.bias is not None)
        new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, **options)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, **options)
        new.bias = old.bias
        model.set_submodule(name, new.to(model.device))
        old.weight.data = old.weight.data.cpu()
        vars(new)[PLAIN] = old  # no part of the model meanwhile
    vars(model)[FOUR_BITS] = True


def check_adapters(model: Model, config: LoraConfig) -> None:
    """Refuse, before anything is changed, what `add_adapters` would refuse."""
    _import_peft()
    require(not adapter_layers(model), "lora: the model has adapters already; merge_and_unload(model) first.")
    if config.quantize == "nf4":
        _import_bitsandbytes(model)
    target_layers(model, config)


def _import_bitsandbytes(model: Model) -> Any:
    require(model.device.type == "cuda", f'lora: quantize "nf4" needs a GPU, the model is on {model.device}.')
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError('lora: quantize "nf4" needs bitsandbytes: pip install bitsandbytes.') from error
    return bitsandbytes


def _settings(config: LoraConfig) -> dict[str, Any]:
    return {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}


def _in_memory(name: str) -> bool:
    return not MEMORY_NAMES.isdisjoint(name.split("."))


def _peft_name(name: str) -> str:
    return FACE_PREFIX + name.replace(f".{ADAPTER}.", ".")


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("lora needs PEFT: pip install peft.") from error
    return peft


def merged_into(model: Model, lora: LoraConfig, trained: Mapping[str, Tensor]) -> Model:
    """`model`, the weights that a run with adapters started from, with what was `trained` merged into it."""
    add_adapters(model, dataclasses.replace(lora, quantize="none"))
    for name, tensor in trained.items():
        model.get_parameter(name).data.copy_(tensor)
    return merge_and_unload(model)
