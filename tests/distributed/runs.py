"""The runs that are made once in one process and again in several: by name, what is trained and how."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from training_cases import PARTIAL, converted_model, tiny_config, tiny_model

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig
from fastweight.grow import look_ahead
from fastweight.layers import InPlaceConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.mixers.lact import LactConfig
from fastweight.mixers.liza import LizaConfig
from fastweight.mixers.ttt import TTTLinearConfig, TTTMLPConfig
from fastweight.optim import AveragingConfig
from fastweight.train import TrainConfig

STEPS = 20
D_MODEL = 16
# One layer of each kind, with a learned initial memory, momentum, windows or convolutions where it has them.
KINDS = {
    "attention": AttentionConfig(num_heads=2, num_kv_heads=1, window=5, num_sinks=3, qk_norm="full"),
    "delta": DeltaConfig(num_heads=2, head_dim=4, value_dim=6, gated=True),
    "lact": LactConfig(num_heads=4, num_fast_heads=2, chunk_size=7, window=9, base_lr=0.05, low_rank=3, prenorm=True),
    "liza": LizaConfig(num_heads=4, num_kv_heads=2, memory_window=6, mag_weight=0.2, mag="learned"),
    "ttt_linear": TTTLinearConfig(num_heads=2, mini_batch_size=8),
    "ttt_mlp": TTTMLPConfig(num_heads=2, mini_batch_size=7, share_qk=False, expansion=3),
}
SAVED = {"checkpoint_every": 8, "keep_checkpoints": 4}
MUON = {
    "name": "muon",
    "normuon": True,
    "muon_rows": "equalised",
    "muon_cautious": True,
    "muon_coefficients": "polar-express",
    "averaging": AveragingConfig(kind="ema", decay=0.9),
    "heldout_tokens": 96,
    **SAVED,
}
BFLOAT16 = {"dtype": "float32", "changes": {"precision": "bfloat16"}}


def mixer_model(kind: str) -> Model:
    """Two blocks with one kind of mixer, in double precision."""
    block = BlockConfig(mixer=KINDS[kind], feed_forward=FeedForwardConfig(hidden=24))
    return build(blocks=(block, block))


def looped_model() -> Model:
    """Three blocks, two of them visited twice, with skips, a smear gate, embedding mixing and an in-place memory."""
    mixer = DeltaConfig(num_heads=2, head_dim=4)
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=24), x0_mix=True, pre_conv=3)
    memory = FeedForwardConfig(hidden=24, memory=InPlaceConfig(chunk_size=8))
    middle = dataclasses.replace(block, feed_forward=memory)
    return build(blocks=(block, middle, block), loops=(1, 3, 2), skips="gated", smear=4, tie_embeddings=False)


def build(**settings) -> Model:
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size=257, d_model=D_MODEL, init_std=0.2, **settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def double_tiny() -> Model:
    return tiny_model(torch.float64)


def ahead_model() -> Model:
    """`tiny_model` with heads for three tokens, two of them with weights of their own."""
    model = look_ahead(double_tiny(), 3)
    with torch.no_grad():
        for layer in model.ahead:
            layer.linear.weight.add_(0.2 * torch.randn(D_MODEL, D_MODEL, dtype=torch.float64))
    return model


def double_converted() -> Model:
    return converted_model(torch.float64)


RUNS: dict[str, tuple[Callable[[], Model], dict]] = {
    **{kind: (partial(mixer_model, kind), {"seq_len": 40, "stats_every": 10}) for kind in KINDS},
    "muon": (double_tiny, MUON),
    "memory": (double_converted, {**PARTIAL["distill"], **SAVED}),
    "packed": (double_tiny, {"view": "bins", "seq_len": 256, "micro_batch_size": 1}),
    "carried": (double_tiny, {"view": "streams", "carry_state": True, **SAVED}),
    "ahead": (ahead_model, {"view": "bins", "seq_len": 64, "micro_batch_size": 1}),
    "weighed": (double_tiny, {"weights": "random", "view": "bins", "seq_len": 64, "micro_batch_size": 1}),
    "mixed": (double_tiny, {"mix": {"other": 0.3}, **SAVED}),
    "looped": (looped_model, {"activation_checkpointing": True}),
}


# Those that are also made by processes that share every sequence.
CUT = ("lact", "muon", "memory", "packed", "looped")


def run_config(store: Path | str, name: str, **more) -> TrainConfig:
    """The settings of the run `name`: 20 steps of 4 sequences."""
    changes = {"steps": STEPS, "lr": 3e-3, "batch_size": 4} | RUNS[name][1] | more
    # What is mixed in is a store that lies beside the first.
    mix = {str(Path(store).parent / name / "store"): share for name, share in changes.pop("mix", {}).items()}
    return tiny_config(store, mix=mix, **changes)
