"""Llama and its relatives with the same tensor names: Mistral, Qwen 2 and 3, OLMo 2, SmolLM 3."""

from typing import Any

from fastweight.configs import require
from fastweight.convert.pretrained.family import Family, decoder
from fastweight.convert.pretrained.names import Rule
from fastweight.convert.pretrained.rotary import rotation
from fastweight.convert.pretrained.settings import GATED, Settings
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig

OUTSIDE = (
    Rule(("embedding",), ("model.embed_tokens",)),
    Rule(("norm",), ("model.norm",)),
    Rule(("head",), ("lm_head",)),
)
SHARED = (
    Rule(("mixer.qkv",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Rule(("mixer.q_norm",), ("self_attn.q_norm",)),
    Rule(("mixer.k_norm",), ("self_attn.k_norm",)),
    Rule(("mixer.out",), ("self_attn.o_proj",)),
    Rule(("feed_forward.gate",), ("mlp.gate_proj",)),
    Rule(("feed_forward.up",), ("mlp.up_proj",)),
    Rule(("feed_forward.down",), ("mlp.down_proj",)),
)
PRE_NORMS = (
    Rule(("mixer_norm",), ("input_layernorm",)),
    Rule(("feed_forward_norm",), ("post_attention_layernorm",)),
)
POST_NORMS = (
    Rule(("mixer_post_norm",), ("post_attention_layernorm",)),
    Rule(("feed_forward_post_norm",), ("post_feedforward_layernorm",)),
)


def heads(c: Settings, kv_heads: int | None = None, head_dim: int | None = None) -> dict[str, int]:
    """num_heads, num_kv_heads and head_dim. kv_heads, head_dim: what the family has where its file does not say;
    None for num_heads, and hidden_size / num_heads."""
    num_heads, hidden = c.size("num_attention_heads"), c.size("hidden_size")
    if head_dim is None and c.data.get("head_dim") is None:
        require(
            hidden % num_heads == 0,
            f"{c.family}: hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}.",
        )
    head_dim = c.size("head_dim", head_dim or hidden // num_heads)
    num_kv_heads = c.optional("num_key_value_heads", int, kv_heads) or num_heads
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def gated(c: Settings, bias: bool = False) -> FeedForwardConfig:
    """The feed-forward of these families."""
    return FeedForwardConfig(kind=c.one_of("hidden_act", GATED, "silu"), hidden=c.size("intermediate_size"), bias=bias)


def _model(
    c: Settings, attention: list[AttentionConfig], *, eps: float = 1e-6, tied: bool = False, mlp_bias: bool = False,
    norm_position: str = "pre",
) -> ModelConfig:  # fmt: skip
    return decoder(
        c, attention, gated(c, mlp_bias), norm_eps=c.number("rms_norm_eps", eps), tied=tied,
        norm_position=norm_position, d_model=c.size("hidden_size"),
    )  # fmt: skip


def _layers(c: Settings, windows: list[int | None] | None, **shared: Any) -> list[AttentionConfig]:
    each = windows or [None for _ in range(c.num_layers())]
    return [AttentionConfig(window=window, **shared) for window in each]


def _biases(c: Settings) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "out_bias"), c.flag("attention_bias", False))


def llama(c: Settings) -> ModelConfig:
    sizes = heads(c)
    attention = _layers(c, None, **sizes, **_biases(c), **rotation(c, sizes["head_dim"]))
    return _model(c, attention, mlp_bias=c.flag("mlp_bias", False))


def mistral(c: Settings) -> ModelConfig:
    sizes = heads(c, 8)
    c.off("layer_types")
    window = c.optional("sliding_window", int, 4096)
    windows = [window] * c.num_layers()
    return _model(c, _layers(c, windows, **sizes, **rotation(c, sizes["head_dim"])))


def _qwen_windows(c: Settings) -> list[int | None]:
    count, first = c.num_layers(), int(c.number("max_window_layers", 28))
    window = c.optional("sliding_window", int, 4096) if c.flag("use_sliding_window", False) else None
    types = c.layer_types(count, lambda i: window is not None and i >= first)
    return c.windows(types, window)


def qwen2(c: Settings) -> ModelConfig:
    sizes = heads(c, 32)
    return _model(c, _layers(c, _qwen_windows(c), **sizes, qkv_bias=True, **rotation(c, sizes["head_dim"])))


def qwen3(c: Settings) -> ModelConfig:
    sizes, eps = heads(c, 32, 128), c.number("rms_norm_eps", 1e-6)
    options = {**sizes, **_biases(c), **rotation(c, sizes["head_dim"]), "qk_norm": "head", "norm_eps": eps}
    return _model(c, _layers(c, _qwen_windows(c), **options))


def olmo2(c: Settings) -> ModelConfig:
    sizes, eps = heads(c), c.number("rms_norm_eps", 1e-5)
    options = {**sizes, **_biases(c), **rotation(c, sizes["head_dim"]), "qk_norm": "full", "norm_eps": eps}
    return _model(c, _layers(c, None, **options), eps=1e-5, norm_position="post")


def smollm3(c: Settings) -> ModelConfig:
    sizes, count = heads(c, 4), c.num_layers()
    rotates, windows = _smollm3_layers(c, count)
    turned, unturned = rotation(c, sizes["head_dim"], theta=2e6), dict[str, Any](rope_base=None)
    attention = [
        AttentionConfig(window=window, **sizes, **_biases(c), **(turned if on else unturned))
        for on, window in zip(rotates, windows, strict=True)
    ]
    return _model(c, attention, tied=True, mlp_bias=c.flag("mlp_bias", False))


def _smollm3_layers(c: Settings, count: int) -> tuple[list[bool], list[int | None]]:
    """Of each layer: whether it rotates, and its window."""
    every, given = c.size("no_rope_layer_interval", 4), c.data.get("no_rope_layers")
    given = [(i + 1) % every != 0 for i in range(count)] if given is None else given
    require(
        isinstance(given, list) and len(given) >= count and all(on in (0, 1) for on in given),
        f"{c.family}: no_rope_layers must list 0 or 1 for {count} layers, got {given!r}.",
    )
    window = c.optional("sliding_window", int) if c.flag("use_sliding_window", False) else None
    types = c.layer_types(count, lambda i: window is not None and not given[i])
    return [bool(on) for on in given[:count]], c.windows(types, window)


FAMILIES = tuple(
    Family(make.__name__, make, OUTSIDE, (*SHARED, *(POST_NORMS if make is olmo2 else PRE_NORMS)))
    for make in (llama, mistral, qwen2, qwen3, olmo2, smollm3)
)
