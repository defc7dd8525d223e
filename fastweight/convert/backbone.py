"""What a model was before it was given a memory."""

from typing import Any

from fastweight.convert.in_place import remove_in_place_memory
from fastweight.convert.mag import find_model, liza_layers
from fastweight.convert.titanize import restore_backbone
from fastweight.in_place import InPlaceFeedForward
from fastweight.model import Model


def drop_memory(model: Any) -> Model:
    """The model without the memories of a conversion (LiZA and In-Place); its tensors are shared, not copied.

    model: a Model or anything that holds one. A model that was never converted comes back as it is.
    """
    plain = find_model(model)
    if any(isinstance(block.feed_forward, InPlaceFeedForward) for block in plain.blocks):
        plain = remove_in_place_memory(plain)
    return restore_backbone(plain) if liza_layers(plain) else plain
