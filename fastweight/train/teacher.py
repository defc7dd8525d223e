"""The teacher inside a converted model: its own backbone, as it was before the conversion."""

import contextlib
from collections.abc import Iterator

from fastweight.convert.mag import backbone_view
from fastweight.in_place import InPlaceFeedForward
from fastweight.model import Model
from fastweight.train.lora import without_adapters


@contextlib.contextmanager
def teacher_view(model: Model) -> Iterator[None]:
    """Inside, `model` computes its backbone: no linear branch, no In-Place memory, no adapter."""
    memories = [block.feed_forward for block in model.blocks if isinstance(block.feed_forward, InPlaceFeedForward)]
    before = [memory.learning for memory in memories]
    for memory in memories:
        memory.learning = False
    try:
        with backbone_view(model), without_adapters(model):
            yield
    finally:
        for memory, value in zip(memories, before, strict=True):
            memory.learning = value
