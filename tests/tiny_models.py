"""Models small enough to be scored and sampled many times in a test."""

import torch

from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig


def delta_config() -> DeltaConfig:
    return DeltaConfig(num_heads=2, head_dim=4, gated=True)


def tiny_model(*, vocab_size: int = 257, attention: bool = False, seed: int = 0, init_std: float = 0.3) -> Model:
    """Two delta blocks, or a delta and a full-attention block; large weights, so that outputs differ."""
    torch.manual_seed(seed)
    second = AttentionConfig(num_heads=2) if attention else delta_config()
    feed_forward = FeedForwardConfig(hidden=16)
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=feed_forward) for mixer in (delta_config(), second))
    return Model(ModelConfig(vocab_size=vocab_size, d_model=16, blocks=blocks, init_std=init_std))
