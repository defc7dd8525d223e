"""Gemma 2 and the text models of Gemma 3 (arXiv:2408.00118, arXiv:2503.19786)."""

import math
from typing import Any

from fastweight.configs import require
from fastweight.convert.pretrained.family import Family, decoder
from fastweight.convert.pretrained.llama import OUTSIDE, POST_NORMS, SHARED, heads
from fastweight.convert.pretrained.names import Rule
from fastweight.convert.pretrained.rotary import rotation
from fastweight.convert.pretrained.settings import GATED, LAYER_TYPES, Settings
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig

NORMS = (
    *POST_NORMS,
    Rule(("mixer_norm",), ("input_layernorm",)),
    Rule(("feed_forward_norm",), ("pre_feedforward_layernorm",)),
)


def gemma2(c: Settings) -> ModelConfig:
    sizes = heads(c, 4, 256)
    types = _layer_types(c, 2)
    turned = rotation(c, sizes["head_dim"])
    shared = _scores(c) | {"softcap": c.optional("attn_logit_softcapping", float, 50.0)} | sizes | turned
    return _model(c, types, [shared] * len(types), final_cap=30.0)


def gemma3_text(c: Settings) -> ModelConfig:
    c.off("attn_logit_softcapping")
    sizes, types = heads(c, 4, 256), _layer_types(c, c.size("sliding_window_pattern", 6))
    shared = _scores(c) | sizes | {"qk_norm": "head", "norm": "rms-offset", "norm_eps": c.number("rms_norm_eps", 1e-6)}
    turned = {kind: _gemma3_rotation(c, kind, sizes["head_dim"]) for kind in LAYER_TYPES}
    return _model(c, types, [shared | turned[kind] for kind in types], final_cap=None)


def _layer_types(c: Settings, every: int) -> list[str]:
    """Of each layer; by default every such layer sees everything."""
    return c.layer_types(c.num_layers(), lambda i: (i + 1) % every != 0)


def _gemma3_rotation(c: Settings, kind: str, head_dim: int) -> dict[str, Any]:
    """Sliding layers have a base of their own; older files' rope_scaling is for the others alone."""
    nested = c.data.get("rope_parameters")
    require(
        nested is None or (isinstance(nested, dict) and any(kind in nested for kind in LAYER_TYPES)),
        f"{c.family}: rope_parameters must hold one object for each of {', '.join(LAYER_TYPES)}, got {nested!r}.",
    )
    scaling = c.data.get("rope_scaling") if kind == "full_attention" else None
    given = ((nested or {}).get(kind) or {}) | (scaling or {})
    data = {key: value for key, value in c.data.items() if key != "rope_scaling"}
    theta, key = (1e6, "rope_theta") if kind == "full_attention" else (1e4, "rope_local_base_freq")
    only = Settings(c.family, data | {"rope_parameters": {kind: given}})
    return rotation(only, head_dim, theta=theta, theta_key=key, layer_type=kind)


def _scores(c: Settings) -> dict[str, Any]:
    bias = c.flag("attention_bias", False)
    return {"scale": c.positive("query_pre_attn_scalar", 256) ** -0.5, "qkv_bias": bias, "out_bias": bias}


def _model(c: Settings, types: list[str], layers: list[dict[str, Any]], final_cap: float | None) -> ModelConfig:
    windows = c.windows(types, c.optional("sliding_window", int, 4096))
    attention = [AttentionConfig(window=window, **layer) for window, layer in zip(windows, layers, strict=True)]
    kind = c.one_of("hidden_activation", GATED, "gelu_pytorch_tanh")
    hidden = c.size("hidden_size")
    return decoder(
        c, attention, FeedForwardConfig(kind=kind, hidden=c.size("intermediate_size")), norm="rms-offset",
        norm_position="both", norm_eps=c.number("rms_norm_eps", 1e-6), tied=True, d_model=hidden,
        embedding_scale=math.sqrt(hidden), logit_softcap=c.optional("final_logit_softcapping", float, final_cap),
    )  # fmt: skip


FAMILIES = tuple(Family(make.__name__, make, OUTSIDE, (*SHARED, *NORMS)) for make in (gemma2, gemma3_text))
