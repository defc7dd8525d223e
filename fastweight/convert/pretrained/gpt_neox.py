"""GPT-NeoX and Pythia (arXiv:2204.06745): parallel residuals, partial rotation, q, k and v of each head together."""

from fastweight.convert.pretrained.family import Family, decoder
from fastweight.convert.pretrained.names import BY_HEAD, Rule
from fastweight.convert.pretrained.rotary import rotation
from fastweight.convert.pretrained.settings import UNGATED, Settings
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig

OUTSIDE = (
    Rule(("embedding",), ("gpt_neox.embed_in",)),
    Rule(("norm",), ("gpt_neox.final_layer_norm",)),
    Rule(("head",), ("lm_head",)),
)
INSIDE = (
    Rule(("mixer_norm",), ("input_layernorm",)),
    Rule(("mixer.qkv",), ("attention.query_key_value",), BY_HEAD),
    Rule(("mixer.out",), ("attention.dense",)),
    Rule(("feed_forward_norm",), ("post_attention_layernorm",)),
    Rule(("feed_forward.up",), ("mlp.dense_h_to_4h",)),
    Rule(("feed_forward.down",), ("mlp.dense_4h_to_h",)),
)


def gpt_neox(c: Settings) -> ModelConfig:
    width, num_heads, bias = c.size("hidden_size"), c.size("num_attention_heads"), c.flag("attention_bias", True)
    turned = rotation(
        c, width // num_heads, theta_key="rotary_emb_base", partial=0.25, partial_key="rotary_pct"
    )  # fmt: skip
    attention = AttentionConfig(num_heads=num_heads, qkv_bias=bias, out_bias=bias, **turned)
    kind = c.one_of("hidden_act", UNGATED, "gelu")
    return decoder(
        c, [attention] * c.num_layers(),
        FeedForwardConfig(kind=kind, hidden=c.size("intermediate_size"), bias=True), norm="layer",
        residual="parallel" if c.flag("use_parallel_residual", True) else "sequential",
        norm_eps=c.number("layer_norm_eps", 1e-5), tied=False, d_model=width,
    )  # fmt: skip


FAMILIES = (
    Family(
        "gpt_neox", gpt_neox, OUTSIDE, INSIDE, layers="gpt_neox.layers.{}.", old_head="embed_out.weight",
        prefix="gpt_neox.",
        ignored=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    ),
)  # fmt: skip
