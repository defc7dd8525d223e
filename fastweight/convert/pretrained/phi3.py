"""Phi 3 (arXiv:2404.14219): Llama with q, k, v in one tensor and gate and up in another."""

from fastweight.convert.pretrained.family import Family, decoder
from fastweight.convert.pretrained.llama import OUTSIDE, PRE_NORMS, gated, heads
from fastweight.convert.pretrained.names import Rule
from fastweight.convert.pretrained.rotary import parameters, rotation
from fastweight.convert.pretrained.settings import Settings
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig

INSIDE = (
    *PRE_NORMS,
    Rule(("mixer.qkv",), ("self_attn.qkv_proj",)),
    Rule(("mixer.out",), ("self_attn.o_proj",)),
    Rule(("feed_forward.gate", "feed_forward.up"), ("mlp.gate_up_proj",)),
    Rule(("feed_forward.down",), ("mlp.down_proj",)),
)


def phi3(c: Settings) -> ModelConfig:
    sizes, window = heads(c), c.optional("sliding_window", int)
    turned = rotation(_modern(c), sizes["head_dim"], partial_key="partial_rotary_factor")
    attention = AttentionConfig(window=window, **sizes, **turned)
    return decoder(
        c, [attention] * c.num_layers(), gated(c), norm_eps=c.number("rms_norm_eps", 1e-5), tied=False,
        d_model=c.size("hidden_size"),
    )  # fmt: skip


def _modern(c: Settings) -> Settings:
    """Early files call longrope "su" or "yarn"; the context before scaling has a default."""
    given = dict(parameters(c))
    kind = given.get("rope_type", given.get("type"))
    given |= {"rope_type": "longrope"} if kind in ("su", "yarn") else {}
    data = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096} | c.data
    return Settings(c.family, data | {"rope_scaling": None, "rope_parameters": given})


FAMILIES = (Family("phi3", phi3, OUTSIDE, INSIDE),)
