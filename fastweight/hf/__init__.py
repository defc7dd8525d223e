"""The Hugging Face face of every model of the library: config, model and cache, known to the Auto classes; callbacks.

Importing this module registers model type "fastweight" with AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from fastweight.hf.cache import FastweightCache
from fastweight.hf.callbacks import AdjustMaGWeightCallback, MagScheduleCallback
from fastweight.hf.config import FastweightConfig
from fastweight.hf.model import FastweightForCausalLM

AutoConfig.register(FastweightConfig.model_type, FastweightConfig, exist_ok=True)
AutoModelForCausalLM.register(FastweightConfig, FastweightForCausalLM, exist_ok=True)

__all__ = [
    "AdjustMaGWeightCallback",
    "FastweightCache",
    "FastweightConfig",
    "FastweightForCausalLM",
    "MagScheduleCallback",
]
