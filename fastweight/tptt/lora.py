"""LoRA adapters that are named as the pretrained model's own layers are."""

from typing import Any

from torch import nn

from fastweight.configs import near_names, require
from fastweight.convert.mag import liza_layers
from fastweight.convert.pretrained import FAMILIES
from fastweight.model import Model

DEFAULT_TARGETS = ["qkv", "out"]


def translate_targets(model: Model, targets: Any) -> Any:
    """The names of this library's linear layers for those of the pretrained family (q_proj → mixer.qkv, …).

    Queries, keys and values are one layer here: any of q_proj, k_proj and v_proj means all three. Names of this library
    stay as they are, and so does a text (a pattern, or PEFT's "all-linear"). None: the projections of attention.
    Raises ValueError for a name that fits no linear layer.
    """
    targets = DEFAULT_TARGETS if targets is None else targets
    if isinstance(targets, str):
        return targets
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    theirs = _names_of_family(model)
    found: set[str] = set()
    for target in targets:
        own = {target} if any(_ends(name, target) for name in linears) else theirs.get(target, set())
        known = {*theirs, *(name.rpartition(".")[2] for name in linears)}
        require(bool(own), f"lora_config: target module {target!r} fits no linear layer.{near_names(target, known)}")
        found |= own
    return sorted(found)


def attach_adapters(face: Any, settings: dict[str, Any]) -> Any:
    """`face` under new adapters, a PeftModel. Trainable: the adapters and the memories, except for a scheduled μ."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora_config needs peft: pip install peft.") from error
    model = face.to_model()
    targets = translate_targets(model, settings.get("target_modules"))
    adapted = peft.get_peft_model(face, peft.LoraConfig(**settings | {"target_modules": targets}))
    for mixer in liza_layers(model).values():
        mixer.memory.requires_grad_(True)
        mixer.mag.requires_grad_(mixer.config.mag == "learned")
    return adapted


def _names_of_family(model: Model) -> dict[str, set[str]]:
    """{their last name: names of ours} of the layers within a block; empty for a model that was not pretrained."""
    family = FAMILIES.get((model.origin or {}).get("family", ""))
    names: dict[str, set[str]] = {}
    for rule in family.inside if family else ():
        for name in rule.theirs:
            names.setdefault(name.rpartition(".")[2], set()).update(rule.ours)
    return names


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
