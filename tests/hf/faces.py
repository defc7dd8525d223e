"""Tiny models of every kind behind the Hugging Face face."""

import os
import socket
import time

import torch
from laws.cases import CASES

from fastweight.hf import FastweightForCausalLM
from fastweight.layers import FeedForwardConfig, InPlaceConfig
from fastweight.mixers import MixerConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.liza import LizaConfig
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig
from fastweight.model import BlockConfig, Model, ModelConfig

VOCAB = 37
FEED_FORWARD = FeedForwardConfig(hidden=16)
IN_PLACE = FeedForwardConfig(hidden=16, memory=InPlaceConfig(chunk_size=4, inner_lr=0.1))
FULL = AttentionConfig(num_heads=2)
WINDOW = AttentionConfig(num_heads=2, window=5, num_sinks=1)
DELTA = DeltaConfig(num_heads=2, head_dim=4, gated=True)
TTT = TTTLinearConfig(num_heads=2, mini_batch_size=4)
MLP = TTTMLPConfig(num_heads=2, mini_batch_size=4, share_qk=False, gate=False)
LIZA = LizaConfig(num_heads=4, num_kv_heads=2, mag_weight=0.4, memory_window=5, memory_sinks=1, order=2, qk_norm="head")
LACT = LactConfig(num_heads=4, num_fast_heads=2, chunk_size=5, window=6, base_lr=0.05, low_rank=3)


def model_of(*mixers: MixerConfig, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Model:
    """A model of these mixers, in eval mode, with large weights so that outputs differ."""
    torch.manual_seed(seed)
    keys = ("residual", "pre_conv", "feed_forward")
    block = {"feed_forward": FEED_FORWARD} | {key: changes.pop(key) for key in keys if key in changes}
    blocks = tuple(BlockConfig(mixer=mixer, **block) for mixer in mixers)
    config = ModelConfig(**{"vocab_size": VOCAB, "d_model": 16, "blocks": blocks, "init_std": 0.3} | changes)
    return Model(config).to(dtype).eval()


def models(dtype: torch.dtype = torch.float32) -> dict[str, Model]:
    """One model per kind, hybrids, tied and untied, with and without each option of the model."""
    return {
        "attention": model_of(FULL, FULL, dtype=dtype),
        "window": model_of(WINDOW, dtype=dtype, tie_embeddings=True),
        "delta": model_of(DELTA, DELTA, dtype=dtype),
        "ttt_linear": model_of(TTT, dtype=dtype, tie_embeddings=True, pre_conv=3),
        "ttt_mlp": model_of(MLP, dtype=dtype),
        "lact": model_of(LACT, dtype=dtype, tie_embeddings=True),
        "liza": model_of(LIZA, FULL, dtype=dtype),
        "in_place": model_of(FULL, FULL, dtype=dtype, feed_forward=IN_PLACE),
        "hybrid": model_of(DELTA, FULL, TTT, dtype=dtype, residual="parallel", logit_softcap=5.0),
        "recurrent": model_of(DELTA, LACT, dtype=dtype, order=(0, 1, 0, 1)),
    }


KINDS = list(models())


def face_of(kind: str, dtype: torch.dtype = torch.float32) -> FastweightForCausalLM:
    return FastweightForCausalLM.from_model(models(dtype)[kind]).eval()


def law_models() -> dict[str, Model]:
    """A model per case of the law tests: every registered mixer with every option."""
    return {name: model_of(config) for name, config in CASES.items()}


def ids_of(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def elsewhere(tmp_path, monkeypatch) -> None:
    """Another day, folder, processor count and host, without a network."""

    def refuse(*args):
        raise OSError("no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 86400.0)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    monkeypatch.setattr(socket.socket, "connect", refuse)
