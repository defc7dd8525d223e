"""The Hugging Face face of every model of the library: config, model and cache, known to the Auto classes; callbacks.

Importing this module registers model type "fastweight" with AutoConfig and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastweight.hf.cache import FastweightCache
from fastweight.hf.callbacks import AdjustMaGWeightCallback, MagScheduleCallback
from fastweight.hf.config import FastweightConfig
from fastweight.hf.model import FastweightForCausalLM


def register(config: type[FastweightConfig], model: type[FastweightForCausalLM]) -> None:
    """Make a face known to the Auto classes, and to the Trainer as one that shifts its labels."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = model.__name__


register(FastweightConfig, FastweightForCausalLM)

__all__ = [
    "AdjustMaGWeightCallback",
    "FastweightCache",
    "FastweightConfig",
    "FastweightForCausalLM",
    "MagScheduleCallback",
    "register",
]
