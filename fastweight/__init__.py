"""Language models whose memory is a small model that keeps learning while it reads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastweight.convert.in_place import add_in_place_memory, remove_in_place_memory
    from fastweight.convert.mag import mag_weights, set_mag_weight
    from fastweight.convert.pretrained import load_pretrained
    from fastweight.convert.titanize import restore_backbone, titanize
    from fastweight.layers import FeedForwardConfig, InPlaceConfig
    from fastweight.mixers import Mixer, MixerConfig, register
    from fastweight.model import BlockConfig, Model, ModelConfig, load
    from fastweight.state import ModelState, load_state

__version__ = "0.1.0"
__all__ = [
    "BlockConfig",
    "FeedForwardConfig",
    "InPlaceConfig",
    "Mixer",
    "MixerConfig",
    "Model",
    "ModelConfig",
    "ModelState",
    "add_in_place_memory",
    "load",
    "load_pretrained",
    "load_state",
    "mag_weights",
    "register",
    "remove_in_place_memory",
    "restore_backbone",
    "set_mag_weight",
    "titanize",
]
# Importing the mixers makes every layer and every type of state known, whatever is asked for first.
_HOMES = (
    "mixers",
    "model",
    "layers",
    "state",
    "convert.titanize",
    "convert.in_place",
    "convert.mag",
    "convert.pretrained",
)


def __getattr__(name: str) -> Any:
    """Import torch and the library when the first name is used: `fastweight --help` need not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module 'fastweight' has no attribute {name!r}")
    for home in _HOMES:
        module = importlib.import_module(f"fastweight.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"fastweight.{name} is promised and found nowhere")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
