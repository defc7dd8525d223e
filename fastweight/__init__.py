"""Language models whose memory is a small model that keeps learning while it reads."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """Import torch and the library when the first name is used: `fastweight --help` need not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module 'fastweight' has no attribute {name!r}")
    # Importing the mixers makes every layer and every type of state known, whatever is asked for first.
    homes = [importlib.import_module(f"fastweight.{home}") for home in ("mixers", "model", "layers", "state")]
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
