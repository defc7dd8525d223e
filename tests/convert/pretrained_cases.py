"""Tiny random decoders of transformers with nothing left at its initial value."""

import functools

import torch
import transformers

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}

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
}  # fmt: skip


@functools.cache
def tiny(case, attention="eager"):
    """The model of a case, or None if transformers has it not with this attention. Its weights depend on `case`."""
    name, settings = CASES[case]
    config = getattr(transformers, name)(**(SIZES | settings))
    config._attn_implementation = attention
    torch.manual_seed(len(case))
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # sdpa has no soft cap
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
