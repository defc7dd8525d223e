"""The table of recipes."""

from collections.abc import Callable

from fastweight.configs import near_names, require
from fastweight.train import TrainConfig

_RECIPES: dict[str, Callable[[], TrainConfig]] = {}


def register(name: str) -> Callable[[Callable[[], TrainConfig]], Callable[[], TrainConfig]]:
    """Decorator: the function, which takes nothing and returns a TrainConfig, becomes the recipe `name`."""

    def keep(make: Callable[[], TrainConfig]) -> Callable[[], TrainConfig]:
        require(name not in _RECIPES, f"recipe {name!r} exists already. Choose another name.")
        _RECIPES[name] = make
        return make

    return keep


def recipe_names() -> list[str]:
    """All names, sorted."""
    return sorted(_RECIPES)


def recipe(name: str) -> TrainConfig:
    """The settings of the recipe `name`; data.store is left for the caller. Raises ValueError with near names."""
    require(name in _RECIPES, f"unknown recipe {name!r}.{near_names(name, _RECIPES)}")
    return _RECIPES[name]()
