"""The weight μ of the memories in a model: set, read, scheduled, or left out for the time of a block."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastweight.configs import require
from fastweight.convert.layer_choice import Layers, choose_layers
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.mixers.liza import Liza
from fastweight.model import Model

Mag = float | Sequence[float]


def find_model(thing: Any) -> Model:
    """The library's Model in `thing`: itself, its `to_model()`, or the one somewhere inside (PEFT, wrappers)."""
    if isinstance(thing, Model):
        return thing
    if callable(getattr(type(thing), "to_model", None)):
        return thing.to_model()
    found = [m for m in thing.modules() if isinstance(m, Model)] if isinstance(thing, torch.nn.Module) else []
    require(len(found) == 1, f"needs a Model or something around one, got {type(thing).__name__}.")
    return found[0]


def liza_layers(model: Any) -> dict[int, Liza]:
    """The LiZA mixers of a model, by the number of their block."""
    # Not block.mixer itself: PEFT and others may have put a wrapper around it.
    blocks = enumerate(find_model(model).blocks)
    return {number: part for number, block in blocks for part in block.modules() if isinstance(part, Liza)}


def set_mag_weight(model: Any, value: Mag | Mapping[int, Mag], layers: Layers | None = None) -> None:
    """Set μ of a titanized model, in place.

    model: Model, its Hugging Face face, or either inside PEFT. value: a number in [0, 1] for all heads, or one per
    head; or {layer: such a value}. layers: as in `titanize`, all titanized ones by default (not with a mapping).
    A state that was made at another μ can go on only if it holds what the new μ needs.
    Raises ValueError, and changes nothing, for other values and for layers without a memory.
    """
    known = liza_layers(model)
    require(bool(known), "set_mag_weight: this model has no liza layer. Make some with titanize first.")
    if isinstance(value, Mapping):
        require(layers is None, "set_mag_weight: {layer: value} names the layers already; leave layers out.")
        wanted = dict(value)
    else:
        total = len(find_model(model).blocks)
        chosen = known if layers is None else choose_layers(layers, total, list(known))
        wanted = dict.fromkeys(chosen, value)
    missing = sorted(set(wanted) - set(known))
    require(not missing, f"set_mag_weight: layer(s) {missing} have no memory; those that do are {sorted(known)}.")
    rows = {layer: _row(v, known[layer].mag.numel()) for layer, v in wanted.items()}
    with torch.no_grad():
        for layer, row in rows.items():
            known[layer].mag.copy_(torch.tensor(row))


def mag_weights(model: Any) -> dict[int, list[float]]:
    """μ of each head as it acts, by the number of the layer."""
    return {number: list(mixer.mag_values()) for number, mixer in liza_layers(model).items()}


def follow_schedule(model: Any, schedule: MagSchedule, step: int) -> dict[int, float]:
    """Set every LiZA layer to its value after `step` optimiser steps; returns the values by layer.

    Call it before the first optimiser step with 0 and after each with the number of steps taken so far.
    """
    layers = list(liza_layers(model))
    values = {layer: schedule.at(step, rank, len(layers)) for rank, layer in enumerate(layers)}
    set_mag_weight(model, values)
    return values


@contextlib.contextmanager
def backbone_view(model: Any) -> Iterator[Model]:
    """Inside, every LiZA layer reads as the untouched backbone's attention, with the backbone's own window.

    States of the view and of the model itself are refused by each other: their caches come from different activations.
    Run and finish the teacher inside, backward passes through checkpointed blocks included.
    """
    base = find_model(model)
    mixers = list(liza_layers(base).values())
    before, signature = [mixer.as_backbone for mixer in mixers], base.signature
    for mixer in mixers:
        mixer.as_backbone = True
    base.signature = f"{base.config.signature} read as its backbone"
    try:
        yield base
    finally:
        base.signature = signature
        for mixer, value in zip(mixers, before, strict=True):
            mixer.as_backbone = value


def _row(value: Any, num_heads: int) -> list[float]:
    """One number per head."""
    row: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    row = row * num_heads if len(row) == 1 else row
    good = len(row) == num_heads and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and 0 <= v <= 1 for v in row
    )
    require(good, f"set_mag_weight: needs a number in [0, 1], or {num_heads} of them (one per head), got {value!r}.")
    return row
