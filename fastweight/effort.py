"""What one token costs: parameters and operations counted as often as they are used, beside the unique ones."""

from typing import Any

import torch
from torch import nn

from fastweight.model import Model, ModelConfig

TRAINING = 3  # a step costs a forward pass, and twice that to differentiate it


def effective_parameters(model: Model) -> int:
    """Parameters that act on a token: those of a block once per visit, weights that a visit owns once, the head once.

    The rows of an embedding are looked up, not multiplied: an untied embedding does not count, a tied one is the head.
    """
    blocks = sum(_block_parameters(model.blocks[i]) for i in model.visits)
    owned = sum(_count(model.blocks[i].weights) for i in set(model.visits) if _owns(model.blocks[i]))
    others = [part for part in (model.norm, model.skips, model.smear) if part is not None]
    return blocks + owned + sum(map(_count, others)) + _head_parameters(model)


def forward_flops(model: Model) -> int:
    """Floating-point operations of one token's forward pass in the layers' matrices, 2 per weight and use.

    Not counted: the products of attention and of memories with what they hold, which depend on the text's length, and
    everything that goes channel by channel. A training step costs about TRAINING times as much per token.
    """
    matrices = sum(_matrix_weights(model.blocks[i]) for i in model.visits)
    return 2 * (matrices + model.config.vocab_size * model.config.d_model)


def empty_model(config: ModelConfig) -> Model:
    """A model without memory for its weights, to be counted."""
    with torch.device("meta"):
        return Model(config)


def _count(module: Any) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _owns(block: Any) -> bool:
    return block.weights is not None and block.visits > 1


def _block_parameters(block: Any) -> int:
    return _count(block) - (_count(block.weights) if _owns(block) else 0)


def _head_parameters(model: Model) -> int:
    return model.embedding.weight.numel() if model.head is None else _count(model.head)


def _matrix_weights(block: Any) -> int:
    return sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
