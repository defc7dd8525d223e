"""A state of the shapes that reading a long text would give, made from a short one: for measuring time and bytes."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastweight.model import Model
from fastweight.model_config import ModelConfig
from fastweight.ops.attention import AttentionState
from fastweight.state import ModelState, tensors

# A multiple of every usual chunk, so that what depends on the place in a chunk is as it would be.
PHASE_TOKENS = 2048


def grow(state: ModelState, length: int) -> ModelState:
    """`state` with its attention caches as long as after `length` tokens, their entries repeated.

    A cache that holds every token so far goes on growing, one that holds fewer has its full size: true of a state that
    has read more than the `longest_window` of its model. Everything else keeps its size, which is right where
    `grows_by_caches_alone`. Only sizes are meant, not what the model says.
    """
    visits = tuple(_grow(visit, length) for visit in state.visits)
    return ModelState(visits, torch.full_like(state.position, length), state.signature, state.note, state.last)


def _grow(tree: Any, length: int) -> Any:
    if isinstance(tree, AttentionState):
        endless = tree.k.shape[1] == int(tree.position.max())
        index = torch.arange(length if endless else tree.k.shape[1], device=tree.k.device) % max(tree.k.shape[1], 1)
        position = torch.full_like(tree.position, length)
        return tree._replace(k=tree.k[:, index], v=tree.v[:, index], position=position)
    if tree is None or isinstance(tree, Tensor):
        return tree
    children = [_grow(child, length) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def longest_window(config: ModelConfig) -> int:
    """The greatest of all windows of the model's layers, 0 if there is none."""
    settings = (item for block in config.blocks for item in dataclasses.asdict(block.mixer).items())
    return max((value for name, value in settings if "window" in name and isinstance(value, int)), default=0)


def grows_by_caches_alone(shorter: ModelState, longer: ModelState) -> bool:
    """Whether `grow` makes from `shorter`, a state of one text, the very shapes of `longer`, read further."""
    return list(shapes(grow(shorter, int(longer.position.max())))) == list(shapes(longer))


def first_length(model: Model, length: int) -> int:
    """The least tokens from which a state of `length` can be made: past all windows, in the same place of a chunk."""
    least = longest_window(model.config) + 1
    return least + (length - least) % PHASE_TOKENS


def shapes(state: ModelState) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor."""
    for name, tensor in tensors(state.visits):
        yield name, tuple(tensor.shape), tensor.dtype
