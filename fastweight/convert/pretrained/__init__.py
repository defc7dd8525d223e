"""Pretrained decoders into the one Model, and back: `load_pretrained`, `restore`, `save_pretrained_format`."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastweight import files
from fastweight.configs import near_names, require
from fastweight.convert.base import Format
from fastweight.convert.folders import require_equal
from fastweight.convert.pretrained import gemma, gpt2, gpt_neox, llama, phi3, shards, tensors
from fastweight.convert.pretrained.family import Family
from fastweight.convert.pretrained.settings import Settings
from fastweight.convert.pretrained.smollm2 import fetch_smollm2
from fastweight.convert.pretrained.sources import CONFIG, read_checkpoint
from fastweight.convert.pretrained.tokenizer import load_pretrained_tokenizer
from fastweight.model import Model
from fastweight.model_config import ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family for module in (llama, gemma, phi3, gpt2, gpt_neox) for family in module.FAMILIES
}


def load_pretrained(source: str | Path, *, gguf_file: str | None = None, dtype: torch.dtype | None = None) -> Model:
    """The pretrained decoder `source` as a Model: the same function, weight for weight.

    source: a folder with config.json and safetensors, a name on the Hugging Face hub, or a .gguf file (gguf_file: the
    file's name within a folder or hub name). dtype: of the weights; by default the file's own, float32 for GGUF.
    `model.origin` keeps what `restore` needs, and the special tokens that generation_config.json names.
    Raises ValueError naming a family without a map, a setting that is not supported, a missing, unexpected or misshapen
    tensor, or a hub name that cannot be fetched; ImportError where the hub or GGUF needs a library.
    """
    name, config, found, generation = read_checkpoint(source, gguf_file)
    family = _family(config.get("model_type"), name)
    model, stored = tensors.read(family, _model_config(family, config), found, name, dtype)
    model.origin = {"family": family.name, "config": config, "stored": stored._asdict()}
    ids = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    model.origin |= {"generation": ids} if ids else {}
    return model


def restore(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) of the checkpoint that the model was loaded from, with the weights it has now.

    Weights that have not changed come back bit for bit: names, shapes, dtypes, a tied head as it was stored.
    Raises ValueError if the model does not come from a checkpoint, or has other layers than the checkpoint holds.
    """
    origin = model.origin or {}
    require(
        {"family", "config", "stored"} <= origin.keys(),
        "this model was not loaded from a pretrained checkpoint, so there is no format to give it back in.",
    )
    family = _family(origin["family"], "origin")
    try:
        require_equal(f"a {family.name} checkpoint", model.config, _model_config(family, origin["config"]))
    except ValueError as error:
        raise ValueError(f"{error} Take the conversion back first, or keep the model with its own save().") from error
    return copy.deepcopy(origin["config"]), tensors.write(family, model, tensors.Stored.of(origin["stored"]))


def save_pretrained_format(model: Model, folder: str | Path, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and safetensors (shards of at most shard_bytes) as transformers loads them.

    Where training changed the dtype of the weights, config.json says the new one.
    """
    config, weights = restore(model)
    folder = Path(folder)
    shards.write_shards(weights, folder, shard_bytes)
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    known = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= {key: dtype for key in known if config.get(key) not in (None, dtype)}
    files.write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _family(name: Any, source: str) -> Family:
    own = " FastweightForCausalLM.from_pretrained loads it." if name in ("fastweight", "tptt") else ""
    near = own or near_names(str(name), FAMILIES)
    require(name in FAMILIES, f"{source}: there is no map for the family {name!r}.{near}")
    return FAMILIES[name]


def _model_config(family: Family, config: dict[str, Any]) -> ModelConfig:
    return family.model_config(Settings(family.name, config))


def _read(src: Path, config: Path | None) -> Model:
    require(config is None, "hf: a checkpoint carries its own config.json; leave --config out.")
    return load_pretrained(src)


FORMAT = Format("hf", _read, save_pretrained_format, f"pretrained decoders of transformers: {', '.join(FAMILIES)}")

__all__ = [
    "FAMILIES",
    "FORMAT",
    "fetch_smollm2",
    "load_pretrained",
    "load_pretrained_tokenizer",
    "restore",
    "save_pretrained_format",
]
