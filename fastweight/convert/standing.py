"""What a rebuilt model takes over from the old one beside its tensors."""

import copy

from fastweight.in_place import InPlaceFeedForward
from fastweight.model import Model


def stand_as(new: Model, model: Model) -> Model:
    """Give `new`, made of the blocks of `model`, its backends, frozen memories, order, origin and modes."""
    for mixer, before in zip(new.mixers(), model.mixers(), strict=True):
        mixer.backend, mixer.learning = before.backend, before.learning
    for block, old in zip(new.blocks, model.blocks, strict=True):
        memory, before = block.feed_forward, old.feed_forward
        if isinstance(memory, InPlaceFeedForward) and isinstance(before, InPlaceFeedForward):
            memory.backend, memory.learning = before.backend, before.learning
    new.set_order(model.visits)
    new.origin, new.checkpointing = copy.deepcopy(model.origin), model.checkpointing
    return new.train(model.training)
