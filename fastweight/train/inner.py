"""Inner-loop statistics: how well each memory fits what it reads, before, after and without its updates."""

from typing import Any

import torch
from torch import Tensor

from fastweight.data import Batch
from fastweight.model import Model

MAX_POINTS = 64


@torch.no_grad()
def inner_statistics(model: Model, batch: Batch, max_tokens: int) -> list[dict[str, Any]]:
    """One entry per visited block whose mixer has an inner loss, measured on the first sequence of `batch`.

    Each entry: visit, block, mixer, `mean` and `series` per name ("initial": the loss under the weights the sequence
    started with, "before" and "after" each update, and what else the mixer defines), series shortened to 64 points.
    Read without dropout, so that no random number is used up.
    """
    length = min(max_tokens, batch.tokens.shape[1])
    if batch.cu_seqlens is not None:
        length = min(length, int(batch.cu_seqlens[1]))
    training = model.training
    model.eval()
    try:
        return _entries(model, batch.tokens[:1, :length])
    finally:
        model.train(training)


def _entries(model: Model, tokens: Tensor) -> list[dict[str, Any]]:
    entries = []
    for visit, (mixer, x, state) in enumerate(_mixer_inputs(model, tokens)):
        series = mixer.inner_losses(x, state)
        if series is None:
            continue
        entries.append(
            {
                "visit": visit,
                "block": model.visits[visit],
                "mixer": mixer.kind,
                "mean": {name: values.float().mean().item() for name, values in series.items() if values.numel()},
                "series": {name: _shorten(values) for name, values in series.items()},
            }
        )
    return entries


def _mixer_inputs(model: Model, tokens: Tensor) -> list[tuple[Any, Tensor, Any]]:
    """(mixer, its input x, its state before x) of each visit, caught in a forward pass."""
    caught: list[tuple[Any, Tensor, Any]] = []
    handles = [
        mixer.register_forward_pre_hook(lambda module, args: caught.append((module, args[0], args[1])))
        for mixer in model.mixers()
    ]
    try:
        model.features(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _shorten(values: Tensor) -> list[float]:
    """At most 64 means over equal stretches."""
    stretches = values.float().tensor_split(min(MAX_POINTS, max(1, values.numel())))
    return [stretch.mean().item() for stretch in stretches if stretch.numel()]
