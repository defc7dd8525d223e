"""TPTT's model: a pretrained decoder, converted, with LoRA adapters, behind the Hugging Face face."""

import contextlib
import copy
import os
import tempfile
from typing import Any

import torch
from transformers import PreTrainedModel

from fastweight.configs import require
from fastweight.convert.mag import find_model
from fastweight.convert.pretrained import load_pretrained
from fastweight.convert.titanize import titanize
from fastweight.hf import FastweightCache, FastweightForCausalLM
from fastweight.model import Model
from fastweight.tptt import options
from fastweight.tptt.config import TpttConfig
from fastweight.tptt.lora import attach_adapters

# Keywords that TPTT hands to from_pretrained of the backbone.
REFUSED = {
    "quantization_config": "a conversion needs weights in floating point",
    "load_in_4bit": "a conversion needs weights in floating point",
    "load_in_8bit": "a conversion needs weights in floating point",
    "device_map": "the model is made on the CPU; move it with model.to(device)",
    "token": "log in with huggingface_hub.login(token) first",
    "trust_remote_code": "the library reads weights itself and runs no code that comes with them",
}


class TpttModel(FastweightForCausalLM):
    """A pretrained decoder with a memory beside its attention layers, and LoRA adapters if the config has them.

    `TpttModel(config)` reads the backbone and converts it. A config that describes a converted model already (from a
    saved folder) builds that model with new weights; `from_pretrained` fills them. `config` itself is not changed.

    backbone: used in place of base_model_name: a Model or a face of one, whose weights become this model's, a decoder
    of transformers, which is copied, or a folder.
    attn_implementation: "eager" or "sdpa"; both mean the library's own attention. dtype (torch_dtype): of the weights.
    gguf_file: the name of the GGUF file in the folder or repository.
    Raises ValueError, by name, for other keywords and for what `load_pretrained`, `titanize` and PEFT refuse.
    """

    config_class = TpttConfig
    config: TpttConfig

    def __init__(
        self, config: TpttConfig, *, backbone: Any = None, attn_implementation: str | None = None,
        dtype: torch.dtype | None = None, torch_dtype: torch.dtype | None = None, gguf_file: str | None = None,
        **unknown: Any,
    ):  # fmt: skip
        for name in unknown:
            reason = REFUSED.get(name, "it is not known here")
            raise ValueError(f"TpttModel: {name}={unknown[name]!r} cannot be used: {reason}.")
        config = copy.deepcopy(config)
        config.attention = attn_implementation or config.attention
        options.check_attention(config.attention)
        model = None
        if config.model is None:
            model = _convert(config, backbone, dtype or torch_dtype, gguf_file)
            config.describe(model)
            config.dtype = model.embedding.weight.dtype
        else:
            given = [v for v in (backbone, dtype, torch_dtype, gguf_file) if v is not None]
            require(not given, "TpttModel: this config describes a converted model; use TpttModel.from_pretrained.")
        with torch.device("meta") if model else contextlib.nullcontext():
            super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers asks the name of the class, which does not say it
        if model is not None:
            self.model = model
        face = FastweightForCausalLM.from_model(self.model)
        # In tuples, so that their parameters are not counted a second time.
        self._face = (face,)
        self._view: tuple[Any] = (face if config.lora_config is None else attach_adapters(face, config.lora_config),)
        self._tell_face()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in FastweightForCausalLM; `backbone` generates as the folder says, too."""
        read = super().from_pretrained(*args, **kwargs)
        (read[0] if isinstance(read, tuple) else read)._tell_face()
        return read

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in FastweightForCausalLM; `backbone` changes with this model."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self._face[0].config.describe(self.model)
        return embedding

    @property
    def backbone(self) -> Any:
        """The same weights as a PeftModel if there are adapters, else as a plain face."""
        return self._view[0].train(self.training)

    def merge_and_unload(self) -> FastweightForCausalLM:
        """A face without adapters, which are added to its weights; they are this model's weights too, from now on."""
        if self.config.lora_config is not None:
            self._view = (self._view[0].merge_and_unload(),)
            self.config.lora_config = None
        self._tell_face()
        return self._view[0]

    def _tell_face(self) -> None:
        """Give the face without adapters this model's sizes, special tokens and settings of generation."""
        face = self._face[0]
        face.config.describe(self.model)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(face.config, name, getattr(self.config, name, None))
        face.generation_config = copy.deepcopy(self.generation_config)


def get_tptt_model(
    model: Any, base_config: Any = None, linear_cache: Any = None, **tptt_options: Any
) -> tuple[FastweightForCausalLM, FastweightCache]:
    """(the converted face of `model`, an empty cache). model: as `backbone` of TpttModel.

    base_config: a TpttConfig whose options hold; any other config is left aside, the model has its own. tptt_options:
    those of TpttConfig, in place of base_config's. The cache is one to give to a call, which otherwise makes its own.
    """
    config = base_config if isinstance(base_config, TpttConfig) else TpttConfig(**tptt_options)
    require(
        config is not base_config or not tptt_options,
        f"get_tptt_model: give a TpttConfig or options, not both: {', '.join(tptt_options)}.",
    )
    require(config.lora_config is None, "get_tptt_model: adapters are put on by TpttModel(config), or by peft.")
    converted = titanize(read_backbone(model), **config.titanize_options())
    return FastweightForCausalLM.from_model(converted), FastweightCache() if linear_cache is None else linear_cache


def _convert(config: TpttConfig, backbone: Any, dtype: torch.dtype | None, gguf_file: str | None) -> Model:
    if backbone is None:
        model = load_pretrained(config.base_model_name, gguf_file=gguf_file, dtype=dtype)
    else:
        require(gguf_file is None, "TpttModel: give backbone or gguf_file, not both.")
        model = read_backbone(backbone)
    # Converted to another dtype after it is made of parameters of its own: the caller keeps the backbone's.
    model = titanize(model, **config.titanize_options())
    # By way of float32: what keeps at least that would not be narrowed at all.
    return model if dtype is None else model.to(torch.promote_types(dtype, torch.float32)).to(dtype)


def read_backbone(backbone: Any) -> Model:
    """The library's Model of a backbone in any of its forms; a decoder of transformers is copied."""
    if isinstance(backbone, (str, os.PathLike)):
        return load_pretrained(os.fspath(backbone))
    if isinstance(backbone, PreTrainedModel) and not isinstance(backbone, FastweightForCausalLM):
        with tempfile.TemporaryDirectory() as folder:
            backbone.save_pretrained(folder)
            return load_pretrained(folder)
    return find_model(backbone)
