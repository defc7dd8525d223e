"""The public names of TPTT (arXiv:2506.17671) over this library: what differs, and why, is in docs/tptt.md.

Importing this module registers model type "tptt" with AutoConfig and AutoModelForCausalLM.
"""

from typing import Any

from fastweight.hf import AdjustMaGWeightCallback, register
from fastweight.hf import FastweightCache as LCache
from fastweight.mixers.liza import Liza as LiZAttention
from fastweight.tptt.callbacks import LiZACallback
from fastweight.tptt.config import TpttConfig
from fastweight.tptt.model import TpttModel, get_tptt_model
from fastweight.tptt.pipeline import TpttPipeline

register(TpttConfig, TpttModel)

__all__ = [
    "AdjustMaGWeightCallback",
    "LCache",
    "LiZACallback",
    "LiZAttention",
    "TpttConfig",
    "TpttModel",
    "TpttPipeline",
    "get_tptt_model",
]

# Names of TPTT that are not here.
ABSENT = {
    "AttentionOperator": "call fastweight.ops.delta.delta_rule",
    "LinearAttention": "the memory is a part of LiZAttention",
    "LinearAttentionOp": "call fastweight.ops.delta.delta_rule",
    "SaveBestModelCallback": 'use save_strategy="best" of TrainingArguments',
    "generate_model_card": "PreTrainedModel.push_to_hub and PEFT write model cards",
    "load_tptt_safetensors": "use TpttModel.from_pretrained",
    "save_tptt_safetensors": "use save_pretrained",
}


def __getattr__(name: str) -> Any:
    hint = f"; {ABSENT[name]}" if name in ABSENT else ""
    raise AttributeError(f"module 'fastweight.tptt' has no {name!r}{hint}.")
