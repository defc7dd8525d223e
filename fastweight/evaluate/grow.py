"""A state of the shapes that reading a long text would give, made from a short one: for measuring time and bytes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastweight.model import Model
from fastweight.ops.attention import AttentionState
from fastweight.state import ModelState, tensors

# A multiple of every usual chunk, so that what depends on the place in a chunk is as it would be.
PHASE_TOKENS = 2048


def grow(model: Model, state: ModelState, length: int) -> ModelState:
    """`state` with its attention caches as long as after `length` tokens, their entries being those it has, repeated.

    A cache of a layer with a window stops at window − 1 entries, as in reading. Everything else keeps its size, which
    is right for a model that `grows_by_caches_alone`. Only sizes are meant, not what the model says.
    """
    configs = [model.config.blocks[i].mixer for i in model.config.visits]
    visits = tuple(
        _grow(visit, length, getattr(config, "window", None))
        for visit, config in zip(state.visits, configs, strict=True)
    )
    return ModelState(visits, torch.full_like(state.position, length), state.signature, state.note)


def _grow(tree: Any, length: int, window: int | None) -> Any:
    if isinstance(tree, AttentionState):
        size = length if window is None else min(length, window - 1)
        return tree._replace(
            k=_repeat(tree.k, size), v=_repeat(tree.v, size), position=torch.full_like(tree.position, length)
        )
    if tree is None or isinstance(tree, Tensor):
        return tree
    children = [_grow(child, length, window) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)


def _repeat(cache: Tensor, size: int) -> Tensor:
    """The entries [N, S, ...] over and over, [N, size, ...]."""
    entries = cache.shape[1]
    return cache if size <= entries else cache[:, torch.arange(size, device=cache.device) % entries]


def grows_by_caches_alone(model: Model, shorter: ModelState, longer: ModelState) -> bool:
    """Whether `grow` makes from `shorter`, a state of one text, the very shapes of `longer`, read further."""
    return list(shapes(grow(model, shorter, int(longer.position.max())))) == list(shapes(longer))


def shapes(state: ModelState) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor."""
    for name, tensor in tensors(state.visits):
        yield name, tuple(tensor.shape), tensor.dtype
