"""What a config.json says, against transformers' own reading of it, and what is refused by name."""

import json
import re

import pytest
import torch
import transformers
from convert.pretrained_cases import SIZES
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastweight import Model
from fastweight.convert.pretrained import FAMILIES
from fastweight.convert.pretrained.settings import Settings
from fastweight.model_config import BlockConfig, ModelConfig
from fastweight.ops.rope import rope_rates, rope_scale

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"short_factor": [1.0 + i / 7 for i in range(4)], "long_factor": [2.0] * 4}
# Configs are judged by transformers' class of the family, which fills in what the file leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def raw(family, **changes):
    sizes = {"vocab_size": 97, "n_layer": 3} if family == "gpt2" else SIZES
    return {"model_type": family, **sizes} | changes


def ours(data):
    family = FAMILIES[data["model_type"]]
    return family.model_config(Settings(family.name, data))


def filled(data):
    """The same file with every key that transformers knows."""
    return json.loads(transformers.AutoConfig.for_model(**data).to_json_string(use_diff=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(family):
    data = raw(family)
    for key in ("num_key_value_heads", "max_position_embeddings"):
        data.pop(key, None)
    data |= {} if family == "gpt2" else {"hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 32}
    assert ours(data) == ours(filled(data))


OLD = {
    "llama, theta": raw("llama", rope_theta=123.0),
    "llama, linear": raw("llama", rope_theta=123.0, rope_scaling={"type": "linear", "factor": 3.0}),
    "llama, llama3": raw("llama", rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "llama, yarn": raw("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "qwen2, windows": raw("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=2),
    "qwen2, no window": raw("qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=2),
    "smollm3, interval": raw("smollm3", no_rope_layer_interval=2, use_sliding_window=True, sliding_window=5),
    "gemma3, pattern": raw("gemma3_text", sliding_window_pattern=2, rope_theta=123.0, rope_local_base_freq=45.0),
    "gemma3, scaling": raw("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "phi3, partial": raw("phi3", partial_rotary_factor=0.5, rope_theta=123.0),
    "phi3, su": raw("phi3", rope_scaling={"type": "su", **LONG, "original_max_position_embeddings": 32}),
    "phi3, longrope": raw("phi3", rope_scaling={"type": "longrope", **LONG}, original_max_position_embeddings=32),
    "gpt_neox": raw("gpt_neox", rotary_pct=0.5, rotary_emb_base=123.0),
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_older_versions_mean_what_they_mean_to_transformers(name):
    assert ours(dict(OLD[name])) == ours(filled(OLD[name]))


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SCALED = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": YARN,
    "yarn, all said": YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 1.3},
    "yarn, scales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
    "longrope": {
        "rope_type": "longrope", "short_factor": [1 + i / 5 for i in range(32)], "long_factor": [2.0] * 32,
        "original_max_position_embeddings": 64, "factor": 4.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_scaled_rotations_turn_as_fast_as_those_of_transformers(name):
    data = raw("llama", head_dim=64, rope_parameters=SCALED[name] | {"rope_theta": 5000.0})
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(data)))
    want, factor = ROPE_INIT_FUNCTIONS[SCALED[name]["rope_type"]](theirs, "cpu")
    mixer = ours(data).blocks[0].mixer
    rates = rope_rates(mixer.rope_base, 64, mixer.rope_scaling)
    assert ((rates - want) / want).abs().max() < 1e-6
    assert rope_scale(mixer.rope_scaling) == pytest.approx(factor, rel=1e-12)


def test_plain_rotations_are_rounded_as_in_transformers():
    config = transformers.LlamaConfig(head_dim=64, rope_theta=123456.0)
    want = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    assert torch.equal(rope_rates(123456.0, 64, None), want)


def test_a_text_beyond_the_context_of_longrope_is_refused():
    longrope = {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 10, "factor": 2.0}
    model = Model(ours(raw("llama", rope_parameters=longrope)))
    _, state = model(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"holds for 10 tokens, the sequence goes on to 11"):
        model(torch.zeros(1, 1, dtype=torch.int64), state)


YARN = {"rope_type": "yarn", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
REFUSED = [
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type "dynamic"'),
    ("llama", {"rope_scaling": {"type": "yran", "factor": 2.0}}, "rope_type 'yran' is not supported. Did you"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "the rope parameters lack factor"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "the rope parameters lack low_freq_factor"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope needs short_factor"),
    ("llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "factors must be a list of 4 numbers"),
    ("llama", {"rope_scaling": "linear"}, "rope parameters must be an object"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("llama", {"num_local_experts": 4}, "num_local_experts is 4"),
    ("llama", {"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
    ("llama", {"hidden_size": None}, "config.json lacks hidden_size"),
    ("llama", {"hidden_size": "32"}, "hidden_size must be int, got str"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must lie in 1..2147483647, got 0"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 10,000, got 1,000,000,000"),
    ("llama", {"vocab_size": 10**30}, "vocab_size must lie in 1..2147483647"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite, got nan"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be finite"),
    ("llama", {"rope_theta": float("inf")}, "rope_theta must be finite, got inf"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported"),
    ("llama", {"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "must exceed 1, got 0"),
    ("llama", {"rope_scaling": YARN | {"mscale": "1", "mscale_all_dim": "1"}}, "rope mscale must be float, got str"),
    ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "must exceed 1, got 1"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive, got 0"),
    ("llama", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads 4"),
    ("llama", {"attention_bias": "yes"}, "attention_bias must be bool"),
    ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types is"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer type 'chunked_attention' is not supported"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must list 3 layers"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is not in use"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must list 0 or 1 for 3 layers"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 3.0}}, "one object for each of full_attention"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
    ("gpt_neox", {"rotary_pct": 0.4}, "rotary_dim must be even"),
    ("gpt_neox", {"rotary_pct": 0.0}, "partial_rotary_factor 0.0 turns 0 of 8 channels"),
    ("gpt_neox", {"rotary_pct": 1.5}, "partial_rotary_factor 1.5 turns 12 of 8 channels"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(family, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(raw(family, **changes))


def test_every_family_builds_blocks_of_attention_and_feed_forward():
    for family in FAMILIES:
        config = ours(raw(family))
        assert isinstance(config, ModelConfig)
        assert [(type(b), b.mixer.kind, b.feed_forward is None) for b in config.blocks] == [
            (BlockConfig, "attention", False)
        ] * 3
