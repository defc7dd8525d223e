"""GPT-2 (Radford et al. 2019): learned positions, layer norms, matrices stored with the input channels first."""

from fastweight.convert.pretrained.family import Family, decoder
from fastweight.convert.pretrained.names import TRANSPOSED, Rule
from fastweight.convert.pretrained.settings import UNGATED, Settings
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig

OUTSIDE = (
    Rule(("embedding",), ("transformer.wte",)),
    Rule(("positions",), ("transformer.wpe",)),
    Rule(("norm",), ("transformer.ln_f",)),
    Rule(("head",), ("lm_head",)),
)
INSIDE = (
    Rule(("mixer_norm",), ("ln_1",)),
    Rule(("mixer.qkv",), ("attn.c_attn",), TRANSPOSED),
    Rule(("mixer.out",), ("attn.c_proj",), TRANSPOSED),
    Rule(("feed_forward_norm",), ("ln_2",)),
    Rule(("feed_forward.up",), ("mlp.c_fc",), TRANSPOSED),
    Rule(("feed_forward.down",), ("mlp.c_proj",), TRANSPOSED),
)


def gpt2(c: Settings) -> ModelConfig:
    width, num_heads = c.size("n_embd", 768), c.size("n_head", 12)
    kind = c.one_of("activation_function", UNGATED, "gelu_new")
    feed_forward = FeedForwardConfig(kind=kind, hidden=c.size("n_inner", 4 * width), bias=True)
    attention = [
        AttentionConfig(
            num_heads=num_heads, rope_base=None, scale=_scale(c, i, width // num_heads), qkv_bias=True, out_bias=True
        )
        for i in range(c.num_layers("n_layer", 12))
    ]
    return decoder(
        c, attention, feed_forward, norm="layer", norm_eps=c.number("layer_norm_epsilon", 1e-5), tied=True,
        d_model=width, max_positions=c.size("n_positions", 1024),
    )  # fmt: skip


def _scale(c: Settings, layer: int, head_dim: int) -> float:
    scale = head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0
    return scale / (layer + 1) if c.flag("scale_attn_by_inverse_layer_idx", False) else scale


FAMILIES = (
    Family(
        "gpt2", gpt2, OUTSIDE, INSIDE, layers="transformer.h.{}.", prefix="transformer.",
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
)  # fmt: skip
