"""Language models whose memory is a small model that keeps learning while it reads."""

from fastweight.layers import FeedForwardConfig
from fastweight.mixers import Mixer, MixerConfig, register
from fastweight.model import BlockConfig, Model, ModelConfig, load
from fastweight.state import ModelState, load_state

__version__ = "0.1.0"
__all__ = [
    "BlockConfig",
    "FeedForwardConfig",
    "Mixer",
    "MixerConfig",
    "Model",
    "ModelConfig",
    "ModelState",
    "load",
    "load_state",
    "register",
]
