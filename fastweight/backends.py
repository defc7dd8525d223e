"""Which backend each op of a model takes, and why: said before anything runs."""

from collections import Counter

import torch

from fastweight.accuracy import recall
from fastweight.model import Model
from fastweight.model_config import ModelConfig
from fastweight.ops import dispatch


def describe_backends(model: Model, dtype: torch.dtype | None = None) -> dict[str, str]:
    """For each op of the model, the backend that will run, why no faster one does, and how exact it is here.

    dtype: of the tokens where it is not that of the weights (under autocast).
    Raises ValueError if a backend that was named cannot run what the model gives it.
    """
    # What the ops will see, as far as the choice of a backend goes: [B, T, H, D].
    sample = torch.zeros(1, 2, 1, 64, dtype=dtype or model.embedding.weight.dtype, device=model.device)
    ops = {op: dispatch.named_or_auto(op, memory.backend) for memory in model.memories() for op in memory.ops}
    known = recall(sample.device, sample.dtype)
    found = {}
    for op, backend in sorted(ops.items()):
        found[op] = explain_choice(op, sample, backend)
        chosen = dispatch.choose(op, backend, sample)
        if chosen != "naive":
            accuracy = known.get(op, {}).get(chosen)
            found[op] += f"; {accuracy}" if accuracy else "; accuracy: see fastweight doctor --measure"
    return found


def explain_choice(op: str, sample: torch.Tensor, backend: str = "auto") -> str:
    """ "chunked (triton needs CUDA tensors, got cpu)": the backend that runs, and what the ones before it say."""
    chosen = dispatch.choose(op, backend, sample)
    if backend != "auto":
        return f"{chosen} (asked for)"
    refused = [f"{name} {reason.rstrip('.')}" for name, reason in dispatch.explain(op, sample) if reason]
    later = ", or a later one in calls where that is faster" if dispatch.may_yield(op, chosen) else ""
    return chosen + later + (f" ({'; '.join(refused)})" if refused else "")


def describe_layers(config: ModelConfig) -> str:
    """ "12 × delta, 12 × attention (window 2,048)": the layers in the order of their first visit."""
    names = []
    for block in config.blocks:
        window = getattr(block.mixer, "memory_window", None) or getattr(block.mixer, "window", None)
        in_place = block.feed_forward is not None and block.feed_forward.memory is not None
        name = block.mixer.kind + (f" (window {window:,})" if window else "")
        names.append(name + (" with in-place memory" if in_place else ""))
    return ", ".join(f"{count} × {name}" for name, count in Counter(names[i] for i in config.visits).items())
