"""Growth: a trained model with more layers, or more tokens predicted, that computes at first the very same function."""

import dataclasses
from typing import Any

import torch

from fastweight.configs import require
from fastweight.in_place import InPlaceFeedForward
from fastweight.model import Model, ModelConfig


@torch.no_grad()
def grow(model: Model, factor: int = 2) -> Model:
    """A model of `factor` times the blocks: each is followed by copies of itself that add nothing yet.

    The matrices through which a copy writes to the residual stream are zero (its other weights are those of the block
    before it, so that they start from something trained), so every output is bit for bit what it was; the zeros get
    gradients like all else. Blocks that are visited several times stay so, with their copies. A state of the old model
    does not fit the new one.
    Raises ValueError for models in which a block's place matters (x0 mixing, residual factors, skips, norms scaled by
    depth), or a factor below 2.
    Source: zero-initialised copies as in LLaMA Pro (Wu et al. 2024, arXiv:2401.02415, section 3.2).
    """
    config = model.config
    require(factor >= 2, f"grow: factor must be at least 2, got {factor}.")
    reasons = {
        "skips": config.skips != "none", "depth_scaled_norms": config.depth_scaled_norms,
        "x0_mix": any(b.x0_mix for b in config.blocks),
        "residual_factors": any(b.residual_factors != "none" for b in config.blocks),
    }  # fmt: skip
    wrong = [name for name, used in reasons.items() if used]
    require(
        not wrong, f"grow: this model uses {', '.join(wrong)}, which depend on a block's place: it cannot be grown."
    )
    grown = Model(_grown_config(config, factor)).to(model.embedding.weight)
    grown.load_state_dict(_grown_weights(model, factor))
    for index, block in enumerate(grown.blocks):
        if index % factor:
            silence(block)
    return grown.train(model.training)


@torch.no_grad()
def look_ahead(model: Model, tokens_ahead: int) -> Model:
    """A model with the same weights that predicts `tokens_ahead` tokens at each position; 1 is a plain model.

    Heads that `model` has stay as they are, further ones start as copies of the first: they predict the next token
    until they are trained. Logits of the heads that stay, and the memory, are bit for bit what they were; a state of
    the old model does not fit the new one.
    """
    other = Model(dataclasses.replace(model.config, tokens_ahead=tokens_ahead)).to(model.embedding.weight)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(other.state_dict() | weights)
    other.origin = model.origin
    return other.train(model.training)


def silence(block: Any) -> None:
    """Make a block add nothing to the residual stream."""
    for part in (block.mixer, block.feed_forward):
        if part is None:
            continue
        write = part.projections()[1]
        write.zero_()
        for module in part.modules():
            if getattr(module, "weight", None) is write and getattr(module, "bias", None) is not None:
                module.bias.zero_()
    if isinstance(block.feed_forward, InPlaceFeedForward):
        block.feed_forward.memory.reset_parameters()
    if block.conv is not None:
        for parameter in block.conv.parameters():
            parameter.zero_()
    for norm in (block.mixer_post_norm, block.feed_forward_post_norm):
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()


def _grown_config(config: ModelConfig, factor: int) -> ModelConfig:
    blocks = tuple(block for block in config.blocks for _ in range(factor))
    if config.loops is not None:
        start, stop, count = config.loops
        return dataclasses.replace(config, blocks=blocks, order=None, loops=(start * factor, stop * factor, count))
    order = config.order and tuple(i * factor + copy for i in config.order for copy in range(factor))
    return dataclasses.replace(config, blocks=blocks, order=order)


def _grown_weights(model: Model, factor: int) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in model.state_dict().items():
        room, *rest = name.split(".")
        if room != "blocks":
            weights[name] = tensor
            continue
        for copy in range(factor):
            weights[".".join([room, str(int(rest[0]) * factor + copy), *rest[1:]])] = tensor
    return weights
