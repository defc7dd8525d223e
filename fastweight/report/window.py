"""The control of equal memory: the same weights behind a sliding window with sinks."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from fastweight.configs import require
from fastweight.convert.standing import stand_as
from fastweight.mixers.attention import AttentionConfig
from fastweight.model import BlockConfig, Model, ModelConfig
from fastweight.ops.attention import AttentionState

ENDLESS = 1 << 32  # tokens; longer than any window


def window_of_same_memory(
    config: ModelConfig, num_bytes: int, num_sinks: int = 4, *, dtype: torch.dtype = torch.float32
) -> int:
    """The largest window with which a state of one request takes at most `num_bytes`, however long its text.

    The window is that of all "attention" blocks, as `with_window` sets it; dtype: of the caches, the model's own.
    Raises ValueError if a window of one token takes more, or there is no attention block.
    """
    low = _largest_bytes(config, 1, num_sinks, dtype)
    require(
        low <= num_bytes,
        f"window_of_same_memory: even a window of 1 token and {num_sinks} sinks takes {low:,} bytes, more than "
        f"{num_bytes:,}. Use fewer sinks, or compare with a larger memory.",
    )
    window = 1
    while window < ENDLESS and _largest_bytes(config, 2 * window, num_sinks, dtype) <= num_bytes:
        window *= 2
    step = window
    while step := step // 2:
        if _largest_bytes(config, window + step, num_sinks, dtype) <= num_bytes:
            window += step
    return window


def windowed_config(config: ModelConfig, window: int, num_sinks: int = 4) -> ModelConfig:
    """`config` with a window and sinks in each "attention" block; one that sees less already stays as it is."""
    require(
        any(_widens(block, None) for block in config.blocks),
        "with_window: no block is of kind 'attention'; there is nothing to give a window to.",
    )
    blocks = tuple(
        dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, window=window, num_sinks=num_sinks))
        if _widens(b, window)
        else b
        for b in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


def with_window(model: Model, window: int, num_sinks: int = 4) -> Model:
    """`model` with a sliding window and sinks in place of full attention. It shares the weights: no copy is made."""
    with torch.device("meta"):
        changed = Model(windowed_config(model.config, window, num_sinks))
    changed.load_state_dict(model.state_dict(), assign=True)
    return stand_as(changed, model)


def _widens(block: BlockConfig, window: int | None) -> bool:
    """Whether a block of attention sees more than `window` tokens (None: is one at all)."""
    mixer = block.mixer
    if mixer.kind != "attention" or not isinstance(mixer, AttentionConfig):
        return False
    return window is None or mixer.window is None or mixer.window > window


def _largest_bytes(config: ModelConfig, window: int, num_sinks: int, dtype: torch.dtype) -> int:
    """Bytes of the state of one request with that window, however long its text."""
    config = windowed_config(config, window, num_sinks)
    with torch.device("meta"):
        state = Model(config).to(dtype).init_state(1)
    caches = ((i, cache) for i, visit in zip(config.visits, state.visits, strict=True) for cache in _caches(visit))
    return state.num_bytes + sum(_full_bytes(config, i, cache) for i, cache in caches)


def _caches(tree: Any) -> Iterator[AttentionState]:
    if isinstance(tree, AttentionState):
        yield tree
    elif isinstance(tree, tuple):
        for child in tree:
            yield from _caches(child)


def _full_bytes(config: ModelConfig, block: int, cache: AttentionState) -> int:
    """Bytes of keys and values that the empty cache of a block comes to hold: window − 1 of each."""
    mixer = config.blocks[block].mixer
    window = getattr(mixer, "window", None)
    if window is None:
        raise ValueError(
            f"window_of_same_memory: block {block}, of kind {mixer.kind!r}, keeps every token, whatever the window of "
            "the attention blocks. Give the config of the backbone."
        )
    return 2 * (window - 1) * cache.k.shape[2] * cache.k.shape[3] * cache.k.element_size()
