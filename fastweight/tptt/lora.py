"""LoRA adapters that are named as the pretrained model's own layers are."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastweight.configs import near_names, require
from fastweight.convert.mag import liza_layers
from fastweight.convert.pretrained import FAMILIES
from fastweight.model import Model

DEFAULT_TARGETS = ["qkv", "out"]
PATTERNS = ("rank_pattern", "alpha_pattern")

# {our full name of a module: all its full names, ours and the pretrained family's}
Names = dict[str, set[str]]


def translate_targets(model: Model, targets: Any) -> Any:
    """The names of this library's linear layers for those of the pretrained family (q_proj → mixer.qkv, …).

    Queries, keys and values are one layer here: any of q_proj, k_proj and v_proj means all three. Names of this library
    stay as they are, and so does a text (a pattern, or PEFT's "all-linear"). None: the projections of attention.
    Raises ValueError for a name that fits no linear layer.
    """
    targets = DEFAULT_TARGETS if targets is None else targets
    if isinstance(targets, str):
        return targets
    known = _linear_names(model)
    return _short({name for target in targets for name in _find("target module", target, known, _ends)}, known)


def translate_settings(model: Model, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a LoraConfig with every name of a layer as `translate_targets` has it.

    A layer that holds several of theirs takes the rank or alpha of any of them, and is excluded with all of them only.
    Raises ValueError for a name that fits nothing, and for names that ask two things of one layer.
    """
    linears = _linear_names(model)
    changed: dict[str, Any] = {"target_modules": translate_targets(model, settings.get("target_modules"))}
    if settings.get("exclude_modules"):
        changed["exclude_modules"] = _excluded(settings["exclude_modules"], linears)
    targets = changed["target_modules"]
    chosen = {n: k for n, k in linears.items() if isinstance(targets, str) or any(_ends(n, t) for t in targets)}
    for option in PATTERNS:
        if settings.get(option):
            changed[option] = _by_layer(option, settings[option], linears, chosen)
    if settings.get("modules_to_save"):
        changed["modules_to_save"] = _saved(model, settings["modules_to_save"])
    return settings | changed


def attach_adapters(face: Any, settings: dict[str, Any]) -> Any:
    """`face` under new adapters, a PeftModel. Trainable: the adapters and the memories, except for a scheduled μ."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_config needs peft: pip install peft.") from error
    model = face.to_model()
    adapted = peft.get_peft_model(face, peft.LoraConfig(**translate_settings(model, settings)))
    for mixer in liza_layers(model).values():
        mixer.memory.requires_grad_(True)
        mixer.mag.requires_grad_(mixer.config.mag == "learned")
    return adapted


def _excluded(names: str | list[str], known: Names) -> list[str]:
    """Names for exclude_modules; a text is a pattern of full names, as in PEFT."""
    fits = _ends if isinstance(names, list) else _is_like
    wanted = [names] if isinstance(names, str) else names
    found = {own for name in wanted for own in _find("exclude_modules:", name, known, fits)}
    for own in sorted(found):
        theirs = known[own] - {own}
        left = [name for name in theirs if not any(fits(name, wish) for wish in wanted)]
        whole = not left or any(fits(own, wish) for wish in wanted)
        require(
            whole,
            f"lora_config: exclude_modules leaves out a part of {own}, which is one layer here; it also holds "
            f"{', '.join(sorted(left))}. Exclude all of it or nothing.",
        )
    return _short(found, known)


def _by_layer(option: str, values: dict[str, Any], known: Names, targets: Names) -> dict[str, Any]:
    """A pattern's values by the names of our layers with adapters. The first key that fits counts, as in PEFT."""
    for key in values:
        _find(f"{option}:", key, known, _ends_like)
    found: dict[str, Any] = {}
    for own, names in targets.items():
        keys = [next((key for key in values if _ends_like(name, key)), None) for name in sorted(names)]
        chosen = {key: values[key] for key in keys if key is not None}
        require(
            len(set(chosen.values())) < 2,
            f"lora_config: {option} asks for {chosen} of {own}, which is one layer here. Give one value.",
        )
        for value in chosen.values():
            found[re.escape(own)] = value
    return found


def _saved(model: Model, names: str | list[str]) -> list[str]:
    """Full names for modules_to_save. A head that is the embedding is trained as that."""
    known = _all_names(model)
    names = [names] if isinstance(names, str) else names
    found = {own for name in names for own in _find("modules_to_save:", name, known, _ends)}
    return sorted(f"model.{own}" for own in found)


def _find(what: str, wish: str, known: Names, fits: Callable[[str, str], bool]) -> set[str]:
    """Our names of the layers that `wish` means. Raises ValueError if there are none."""
    found = {own for own, names in known.items() if any(fits(name, wish) for name in names)}
    endings = {name.rpartition(".")[2] for names in known.values() for name in names}
    kind = "module" if what.startswith("modules_to_save") else "linear layer"
    require(bool(found), f"lora_config: {what} {wish!r} fits no {kind}.{near_names(wish, endings)}")
    return found


def _linear_names(model: Model) -> Names:
    linears = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return {own: names for own, names in _all_names(model).items() if own in linears}


def _all_names(model: Model) -> Names:
    """Of every module; those of the family are missing for a model that was not pretrained."""
    names = {name: {name} for name, _ in model.named_modules() if name}
    for ours, theirs in _pairs(model):
        for own in ours:
            own = "embedding" if own == "head" and model.head is None else own
            names.get(own, set()).update(theirs)
    return names


def _pairs(model: Model) -> Iterator[tuple[list[str], list[str]]]:
    """Full names of modules of ours and of the family's that hold the same rows."""
    family = FAMILIES.get((model.origin or {}).get("family", ""))
    if family is None:
        return
    for rule in family.outside:
        yield list(rule.ours), list(rule.theirs)
    for number in range(len(model.blocks)):
        layer = family.layers.format(number)
        for rule in family.inside:
            yield [f"blocks.{number}.{name}" for name in rule.ours], [layer + name for name in rule.theirs]


def _short(found: set[str], known: Names) -> list[str]:
    """`found` without the numbers of blocks where a name means a layer of every block."""
    single = {_within_block(name) for name in known.keys() - found}
    return sorted({name if _within_block(name) in single else _within_block(name) for name in found})


def _within_block(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def _ends(name: str, wish: str) -> bool:
    return name == wish or name.endswith("." + wish)


def _ends_like(name: str, pattern: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _is_like(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, name) is not None
