"""Memory layers. Every module here registers its mixers; importing this package discovers them all."""

import importlib
import pkgutil

from fastweight.mixers.base import Mixer, MixerConfig, mixer_class, mixer_kinds, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Mixer", "MixerConfig", "mixer_class", "mixer_kinds", "register"]
