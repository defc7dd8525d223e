"""lact: folders of the published LaCT language model, config.json and safetensors (github.com/a1600012888/LaCT)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastweight import files
from fastweight.configs import near_names, require
from fastweight.convert.base import Format, keep_source, read_json, source_of
from fastweight.convert.folders import WEIGHTS, check_number, read_weights, require_equal, same_bytes, skeleton
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.lact import LactConfig
from fastweight.model import BlockConfig, Model, ModelConfig, check_weights

NAME = "lact"
EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"
BASE_LR, NORM_EPS = 0.001, 1e-5  # fixed in the published code

# Key of config.json → the published default, which an absent key means.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attn_heads": 32,
    "num_lact_heads": 4,
    "inter_multi": 1.0,
    "qkv_bias": False,
    "attn_qk_norm": False,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "use_muon": False,
    "use_momentum": True,
    "lr_dim": 1,
    "qkv_silu": True,
    "no_v_silu": False,
    "learnable_ttt_scale": True,
    "ttt_prenorm": False,
    "ttt_nope": False,
    "w0_w2_low_rank": -1,
    "fw_init_gain": 0.5,
    "use_fused_kernel": False,
    "rope_theta": 10000.0,
    "hidden_ratio": 4.0,
    "intermediate_size": None,
    "initializer_range": 0.006,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
OPTIONAL = {"window_size", "intermediate_size"}  # null is a value of theirs
FIXED = {
    "model_type": ("lact_swiglu",),
    "lr_parameterization": ("mamba",),
    "ttt_loss_type": ("dot_product",),
    "hidden_act": ("swish", "silu"),
}
# Kernels, table sizes, and keys that the published code stores without using them: they do not change the function.
WITHOUT_EFFECT = {
    "fp32_states", "fuse_norm", "last_layer_fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "max_position_embeddings",
    "elementwise_affine", "attention_bias", "use_cache",
}  # fmt: skip
# What transformers writes into any config.json.
GENERIC = {
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "return_dict",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "id2label", "label2id", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "finetuning_task", "task_specific_params", "problem_type", "prefix",
    "tokenizer_class", "torchscript", "pruned_heads", "_attn_implementation", "_attn_implementation_autoset",
    "_commit_hash",
}  # fmt: skip

TOP = {"embedding.weight": EMBEDDING, "norm.weight": "model.norm.weight", "head.weight": HEAD}
BLOCK = {
    "mixer_norm.weight": "attn_norm.weight",
    "feed_forward_norm.weight": "mlp_norm.weight",
    "feed_forward.gate.weight": "mlp.gate_proj.weight",
    "feed_forward.up.weight": "mlp.up_proj.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}
MIXER = {
    "qkv": "qkv",
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "qk_scale": "qk_scale",
    "qk_offset": "qk_offset",
    "rate": "lr_proj",
    "momentum": "momentum_proj.0",
    "gate": "ttt_scale_proj",
    "w0": "w0",
    "w1": "w1",
    "w2": "w2",
    "out_norm": "ttt_norm",
    "out": "o_proj",
}
LEAF = {"left": "w_left", "right": "w_right"}


def read(src: Path, config: Path | None) -> Model:
    """The model in the folder `src`; `config` replaces its config.json."""
    require(src.is_dir(), f"{src} is not a folder. A {NAME} checkpoint is a folder with config.json and safetensors.")
    path = src / "config.json" if config is None else config
    data = read_json(path, "the settings of a LaCT model (hidden_size, num_lact_heads, ...)")
    model = skeleton(to_config(data, str(path)))
    found = read_weights(src)
    head_stored = HEAD in found
    if model.head is None and head_stored:
        embedding, head = found.get(EMBEDDING), found.pop(HEAD)
        same = embedding is not None and same_bytes(head, embedding)
        require(same, f"{src}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true.")
    shapes = model.state_dict()
    check_weights(str(src), found, {published(name): tuple(t.shape) for name, t in shapes.items()})
    model.load_state_dict({name: found.pop(published(name)) for name in shapes}, assign=True)
    return keep_source(model, NAME, {"config": data, "head_stored": head_stored})


def write(model: Model, dst: Path) -> None:
    """Write config.json and model.safetensors into `dst`."""
    source = source_of(model, NAME)
    data = source.get("config")
    # The original text as long as it describes the model; otherwise what the model is, and the original's other keys.
    if data is None or _any_rounding(to_config(data, "source_config.json")) != _any_rounding(model.config):
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        data = (data or {}) | to_json(model.config) | {"torch_dtype": dtype}
    weights = {published(name): t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if model.head is None and source.get("head_stored", False):
        weights[HEAD] = weights[EMBEDDING].clone()
    files.write_atomically(dst / WEIGHTS, lambda temporary: save_file(weights, temporary, {"format": "pt"}))
    files.write_text(dst / "config.json", json.dumps(data, indent=2, sort_keys=True) + "\n")


def published(name: str) -> str:
    """The published name of our tensor `name`."""
    if name in TOP:
        return TOP[name]
    _, number, rest = name.split(".", 2)
    prefix = f"model.layers.{number}."
    if rest in BLOCK:
        return prefix + BLOCK[rest]
    _, part, *leaf = rest.split(".")
    return ".".join([f"{prefix}attn.{MIXER[part]}", *(LEAF.get(x, x) for x in leaf)])


def to_config(data: dict[str, Any], source: str) -> ModelConfig:
    """The config of a published config.json. Settings that this library does not compute are refused by name."""
    _check_known(data, source)
    c = DEFAULTS | {key: data[key] for key in DEFAULTS if key in data}
    for key, value in c.items():
        kind = int if key == "intermediate_size" else type(DEFAULTS[key])
        if value is not None or key not in OPTIONAL:
            c[key] = check_number(f"{source}: {key}", kind, value)
    _check_heads(c, source)
    _check_fused(c, source)
    muon = ("joint" if c["use_fused_kernel"] else "separate") if c["use_muon"] else "none"
    mixer = LactConfig(
        num_heads=c["num_attn_heads"], num_fast_heads=c["num_lact_heads"], inter_multi=c["inter_multi"],
        chunk_size=c["lact_chunk_size"], window=c["window_size"], qkv_bias=c["qkv_bias"], qk_norm=c["attn_qk_norm"],
        muon=muon, muon_dtype="bfloat16" if c["use_muon"] else "float32", momentum=c["use_momentum"],
        prenorm=c["ttt_prenorm"], rope_base=c["rope_theta"], fast_rope=not c["ttt_nope"], qkv_silu=c["qkv_silu"],
        v_silu=not c["no_v_silu"], output_gate=c["learnable_ttt_scale"], low_rank=max(0, c["w0_w2_low_rank"]),
        init_gain=c["fw_init_gain"], base_lr=BASE_LR, lr_dim=c["lr_dim"], norm_eps=NORM_EPS,
    )  # fmt: skip
    block = BlockConfig(mixer=mixer, feed_forward=FeedForwardConfig(hidden=_hidden(c)))
    return ModelConfig(
        vocab_size=c["vocab_size"], d_model=c["hidden_size"], blocks=(block,) * c["num_hidden_layers"],
        norm_eps=c["norm_eps"], tie_embeddings=c["tie_word_embeddings"], init_std=c["initializer_range"],
    )  # fmt: skip


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The published config.json of a model. Raises ValueError, naming the reason, for one that it cannot describe."""
    mixer, feed_forward = config.blocks[0].mixer, config.blocks[0].feed_forward
    require(isinstance(mixer, LactConfig), f"{NAME} holds LaCT models; this one's first block is a {mixer.kind}.")
    require(feed_forward is not None, f"{NAME} needs a feed-forward in every block; block 0 has none.")
    assert isinstance(mixer, LactConfig)
    assert feed_forward is not None
    require(
        mixer.muon != "joint" or mixer.prenorm,
        f'{NAME} cannot hold muon="joint" without prenorm: the published kernel that orthogonalises jointly then puts '
        "the epsilon of the row norms inside the root.",
    )
    data = {
        "architectures": ["LaCTForCausalLM"], **{key: values[0] for key, values in FIXED.items()},
        "hidden_size": config.d_model, "num_hidden_layers": len(config.blocks), "num_attn_heads": mixer.num_heads,
        "num_lact_heads": mixer.num_fast_heads, "inter_multi": mixer.inter_multi, "qkv_bias": mixer.qkv_bias,
        "attn_qk_norm": mixer.qk_norm, "lact_chunk_size": mixer.chunk_size, "window_size": mixer.window,
        "use_muon": mixer.muon != "none", "use_momentum": mixer.momentum, "lr_dim": mixer.lr_dim,
        "qkv_silu": mixer.qkv_silu, "no_v_silu": not mixer.v_silu, "learnable_ttt_scale": mixer.output_gate,
        "ttt_prenorm": mixer.prenorm, "ttt_nope": not mixer.fast_rope, "w0_w2_low_rank": mixer.low_rank or -1,
        "fw_init_gain": mixer.init_gain, "use_fused_kernel": mixer.muon == "joint", "rope_theta": mixer.rope_base,
        "intermediate_size": feed_forward.hidden, "initializer_range": config.init_std, "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "vocab_size": config.vocab_size,
    }  # fmt: skip
    require_equal(NAME, _any_rounding(config), _any_rounding(to_config(data, NAME)))
    return data


def _check_known(data: dict[str, Any], source: str) -> None:
    for key, values in FIXED.items():
        got = data.get(key, values[0])
        require(got in values, f"{source}: {key} is {got!r}; this library computes {values[0]!r} only.")
    known = DEFAULTS.keys() | FIXED.keys() | WITHOUT_EFFECT | GENERIC
    for key, value in data.items():
        require(
            key in known or value is None,
            f"{source}: unknown key {key!r} with value {value!r}.{near_names(key, known)} "
            "If it does not change the function, remove it.",
        )


def _check_heads(c: dict[str, Any], source: str) -> None:
    heads, width, layers = c["num_attn_heads"], c["hidden_size"], c["num_hidden_layers"]
    swapped = (
        f" The published 3B momentum file has its numbers swapped (the paper trains 25 layers of 24 heads): with it no "
        f"model can run. If the {layers} layers of this checkpoint were trained, set num_attn_heads to the number used."
    )
    require(
        heads > 0 and width % heads == 0,
        f"{source}: num_attn_heads {heads} does not divide hidden_size {width}."
        + (swapped if (heads, width) == (25, 3072) else " One of them must be wrong."),
    )


def _check_fused(c: dict[str, Any], source: str) -> None:
    require(
        not c["use_fused_kernel"] or c["ttt_prenorm"],
        f"{source}: use_fused_kernel without ttt_prenorm is another function: it puts the epsilon of the row norms "
        "inside the root, and orthogonalises w0 and w2 jointly if use_muon is true; this library does not compute it. "
        "Without Muon, use_fused_kernel false runs the same weights; rows of norm one then differ by 5e-6 per update.",
    )


def _hidden(c: dict[str, Any]) -> int:
    """Width of the feed-forward: given, or two thirds of hidden_ratio · hidden_size, rounded up to 256."""
    if c["intermediate_size"] is not None:
        return c["intermediate_size"]
    return -(-int(c["hidden_size"] * c["hidden_ratio"] * 2 / 3) // 256) * 256


def _any_rounding(config: ModelConfig) -> ModelConfig:
    """The config without its choice of Newton-Schulz precision, for which the format has no key."""
    blocks = tuple(
        dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, muon_dtype="float32"))
        if isinstance(b.mixer, LactConfig)
        else b
        for b in config.blocks
    )
    return dataclasses.replace(config, blocks=blocks)


FORMAT = Format(NAME, read, write, "LaCT language model: folder of the published code, config.json + safetensors")
