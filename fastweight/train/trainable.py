"""Which parameters of a model a run trains; all others are frozen: no gradient, no optimiser, bit for bit the same."""

import fnmatch
from collections.abc import Iterable

from torch import nn

from fastweight.configs import near_names, require
from fastweight.convert.mag import liza_layers
from fastweight.model import Model
from fastweight.train.config import LORA, MEMORY, TrainConfig

# A conversion adds its parameters to the backbone's modules under these names.
MEMORY_NAMES = frozenset({"memory", "mag"})
ADAPTER_PREFIX = "lora_"


def is_memory(name: str) -> bool:
    """Whether the parameter `name` was added by a conversion to a pretrained backbone."""
    return not MEMORY_NAMES.isdisjoint(name.split("."))


def is_adapter(name: str) -> bool:
    """Whether the parameter `name` belongs to a low-rank adapter."""
    return any(part.startswith(ADAPTER_PREFIX) for part in name.split("."))


def memory_parameters(model: nn.Module) -> list[str]:
    """The names of all parameters that a conversion has added, in the model's order."""
    return [name for name, _ in model.named_parameters() if is_memory(name)]


def trained_names(model: Model, config: TrainConfig, words: Iterable[str]) -> list[str]:
    """The parameters that `words` (those of config.trainable) name, in the model's order.

    The weights of linear branches are among them only where the model's config says that they are learned. Raises
    ValueError for a word or pattern that fits nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    scheduled = {id(mixer.mag) for mixer in liza_layers(model).values() if mixer.config.mag == "scheduled"}
    set_from_outside = {name for name, parameter in model.named_parameters() if id(parameter) in scheduled}
    chosen: set[str] = set()
    for word in words:
        found = set(_fitting(word, names, config, set_from_outside))
        require(bool(found), _nothing(word, names, set_from_outside))
        chosen |= found
    return [name for name in names if name in chosen]


def set_trainable(model: Model, names: Iterable[str]) -> None:
    """Let exactly the parameters `names` need gradients."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def check_backbone_frozen(names: Iterable[str], objective: str) -> None:
    """Refuse an objective whose teacher is the backbone if a backbone's weight is among the trained `names`."""
    moved = [name for name in names if not is_memory(name) and not is_adapter(name)]
    require(
        not moved,
        f"objective {objective!r} learns from the frozen backbone, but trainable names weights of it: "
        f"{', '.join(moved[:3])}{' ...' if len(moved) > 3 else ''}. Train the memory, adapters, or both.",
    )


def _fitting(word: str, names: list[str], config: TrainConfig, set_from_outside: set[str]) -> list[str]:
    memory = [name for name in names if is_memory(name) and name not in set_from_outside]
    if word == MEMORY:
        return memory
    if word == LORA:
        return [name for name in names if is_adapter(name)] + (memory if config.lora.train_memory else [])
    return [name for name in names if fnmatch.fnmatchcase(name, word) and name not in set_from_outside]


def _nothing(word: str, names: list[str], set_from_outside: set[str]) -> str:
    if word == MEMORY:
        return "trainable 'memory': this model has no memory beside its backbone. Convert it first (titanize)."
    if any(fnmatch.fnmatchcase(name, word) for name in set_from_outside):
        advice = 'They follow a schedule, or stay; convert with mag="learned" to train them.'
        return f"trainable {word!r} names weights of linear branches alone. {advice}"
    return f"trainable {word!r} fits no parameter.{near_names(word, names[:40])}"
