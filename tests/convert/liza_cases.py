"""Tiny backbones and the ways to titanize them."""

import pytest
import torch
from torch import Tensor

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig
from fastweight.hf import FastweightForCausalLM
from fastweight.mixers.attention import AttentionConfig

VOCAB, T = 37, 23
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, qk_norm="head", qkv_bias=True)
SETTINGS = {
    "plain": {},
    "windowed": {"window": 5, "num_sinks": 2, "positions": "rope"},
    "rich": {"order": 2, "conv_width": 3, "feature_map": "hedgehog", "output_norm": "rms"},
}
with_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
with_weights = pytest.mark.parametrize("mag", [0.3, 1.0])


def backbone(*mixers, dtype=torch.float32, **changes) -> Model:
    torch.manual_seed(0)
    mixers = mixers or (ATTENTION, ATTENTION)
    blocks = tuple(BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=24)) for mixer in mixers)
    config = ModelConfig(**{"vocab_size": VOCAB, "d_model": 16, "blocks": blocks, "init_std": 0.3} | changes)
    return Model(config).to(dtype).eval()


def ids(*shape, seed=1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def face(model: Model) -> FastweightForCausalLM:
    return FastweightForCausalLM.from_model(model).eval()
