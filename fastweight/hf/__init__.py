"""The Hugging Face face of every model of the library: config, model and cache, known to the Auto classes; callbacks.

Importing this module registers model type "fastweight" with AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastweight.hf.cache import FastweightCache
from fastweight.hf.callbacks import AdjustMaGWeightCallback, MagScheduleCallback
from fastweight.hf.config import FastweightConfig
from fastweight.hf.model import FastweightForCausalLM

AutoConfig.register(FastweightConfig.model_type, FastweightConfig, exist_ok=True)
AutoModelForCausalLM.register(FastweightConfig, FastweightForCausalLM, exist_ok=True)
# Trainer looks here for whether a model's labels are to be shifted before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[FastweightConfig.model_type] = FastweightForCausalLM.__name__

__all__ = [
    "AdjustMaGWeightCallback",
    "FastweightCache",
    "FastweightConfig",
    "FastweightForCausalLM",
    "MagScheduleCallback",
]
