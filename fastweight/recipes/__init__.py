"""Runs by name: Python functions that return a TrainConfig. Every module here registers its own."""

import importlib
import pkgutil

from fastweight.recipes.registry import recipe, recipe_names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["recipe", "recipe_names", "register"]
