"""Tiny random decoders of transformers with nothing left at its initial value."""

import functools

import torch
import transformers

SHARED = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
SIZES = SHARED | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
GEMMA2_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

# Name → (config class, settings beside SIZES).
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama-biases-tied": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-wide-heads-llama3": ("LlamaConfig", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 7, "head_dim": 12}),
    "mistral-no-window": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-some-windows": (
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "rms_norm_eps": 1e-3},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "qwen3-layer-types": (
        "Qwen3Config",
        {
            "head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "olmo2-biases": ("Olmo2Config", {"attention_bias": True, "rms_norm_eps": 1e-3}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3-windows": (
        "SmolLM3Config",
        {
            "use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1], "attention_bias": True,
            "mlp_bias": True, "tie_word_embeddings": False,
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20, **GEMMA2_CAPS}),
    "gemma2-no-caps": (
        "Gemma2Config",
        {
            "head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": None, "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"], "attention_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 12, "sliding_window": 6, "sliding_window_pattern": 2}),
    "gemma3-scaled": (
        "Gemma3TextConfig",
        {
            "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 30, "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"], "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 11}),
    "phi3-partial": ("Phi3Config", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "Phi3Config", {"original_max_position_embeddings": 48, "max_position_embeddings": 192, "rope_scaling": LONGROPE}
    ),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-other-scales": (
        "GPT2Config",
        {
            **GPT2, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": 40,
            "activation_function": "gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5, "layer_norm_eps": 1e-2}),
    "gpt_neox-sequential": (
        "GPTNeoXConfig",
        {
            "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new", "rotary_pct": 1.0,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip


@functools.cache
def tiny(case, attention="eager"):
    """The model of a case, or None if transformers has it not with this attention. Its weights depend on `case`."""
    name, settings = CASES[case]
    config = getattr(transformers, name)(**(SHARED if name == "GPT2Config" else SIZES) | settings)
    config._attn_implementation = attention
    torch.manual_seed(len(case))
    if attention == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        return None  # it has no cap; some versions leave the cap out, others refuse
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough for sharp softmaxes: a wrong window, rotation or norm must show.
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    return model.eval()


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def greedy(model, prompt, count):
    """The next `count` tokens, each the most probable."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()
