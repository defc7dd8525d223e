"""Small checkpoints in the formats of the published TTT code, written here without the library."""

import msgpack
import torch

D, HIDDEN, LAYERS, HEADS, HEAD_DIM, CHUNK, VOCAB = 16, 24, 2, 2, 8, 16, 50


def published_shapes(kind, mamba):
    """Name → shape of every tensor of the PyTorch code."""
    wide = HEAD_DIM if kind == "linear" else 4 * HEAD_DIM
    block = {f"seq_modeling_block.{n}_proj.weight": (D, D) for n in ("qvog" if mamba else "qkvo")}
    block |= {"seq_norm.weight": (D,), "ffn_norm.weight": (D,), "mlp.gate_proj.weight": (HIDDEN, D)}
    block |= {"mlp.up_proj.weight": (HIDDEN, D), "mlp.down_proj.weight": (D, HIDDEN)}
    if mamba:
        convs = "conv.conv", "seq_modeling_block.conv_q", "seq_modeling_block.conv_k"
        block |= {f"{c}.weight": (D, 1, 4) for c in convs} | {f"{c}.bias": (D,) for c in convs}
        block["conv.norm.weight"] = (D,)
    inner = {"W1": (HEADS, HEAD_DIM, wide), "b1": (HEADS, 1, wide), "learnable_token_idx": (CHUNK,)}
    inner |= {"learnable_ttt_lr_weight": (HEADS, 1, D), "learnable_ttt_lr_bias": (HEADS, 1)}
    inner |= {"ttt_norm_weight": (HEADS, HEAD_DIM), "ttt_norm_bias": (HEADS, HEAD_DIM)}
    inner |= {"post_norm.weight": (D,), "post_norm.bias": (D,)}
    if kind == "mlp":
        inner |= {"W2": (HEADS, wide, HEAD_DIM), "b2": (HEADS, 1, HEAD_DIM)}
    block |= {f"seq_modeling_block.{name}": shape for name, shape in inner.items()}
    whole = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    return whole | {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}


def published_config(kind, mamba):
    """config.json of the PyTorch code."""
    return {
        "model_type": "ttt", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "mini_batch_size": CHUNK, "ttt_layer_type": kind,
        "use_gate": mamba, "share_qk": mamba, "pre_conv": mamba, "conv_kernel": 4, "tie_word_embeddings": True,
        "ttt_base_lr": 1.0 if kind == "linear" else 0.1,
    }  # fmt: skip


def random_tensors(kind, mamba, dtype=torch.float32):
    """Name → tensor of the PyTorch code, small random values."""
    return {name: (0.3 * torch.randn(shape)).to(dtype) for name, shape in published_shapes(kind, mamba).items()}


_TOP = {
    "model.embed_tokens.weight": ("model", "wte", "embedding"),
    "model.norm.weight": ("model", "ln_f", "kernel"),
    "lm_head.weight": ("lm_head", "kernel"),
}
_LAYER = {
    "seq_norm.weight": "seq_norm kernel", "ffn_norm.weight": "ffn_norm kernel",
    "conv.norm.weight": "conv conv_norm kernel", "conv.conv.weight": "conv conv1 kernel",
    "conv.conv.bias": "conv conv1 bias",
    "mlp.gate_proj.weight": "feed_forward w1 kernel", "mlp.up_proj.weight": "feed_forward w3 kernel",
    "mlp.down_proj.weight": "feed_forward w2 kernel",
}  # fmt: skip
_INNER = {
    "q_proj.weight": "wq kernel", "k_proj.weight": "wk kernel", "v_proj.weight": "wv kernel",
    "o_proj.weight": "wo kernel", "g_proj.weight": "wg kernel", "conv_q.weight": "conv_q kernel",
    "conv_q.bias": "conv_q bias",
    "conv_k.weight": "conv_k kernel", "conv_k.bias": "conv_k bias", "learnable_token_idx": "learnable_token_idx",
    "learnable_ttt_lr_weight": "learnable_ttt_lr/kernel", "learnable_ttt_lr_bias": "learnable_ttt_lr/bias",
    "ttt_norm_weight": "ttt_norm/scale", "ttt_norm_bias": "ttt_norm/bias", "W1": "ttt_dense_0", "b1": "ttt_bias_0",
    "W2": "ttt_dense_1", "b2": "ttt_bias_1", "post_norm.weight": "post_norm scale", "post_norm.bias": "post_norm bias",
}  # fmt: skip


def to_jax(name, tensor):
    """The JAX code's path and layout of a tensor of the PyTorch code."""
    if name in _TOP:
        return _TOP[name], tensor.T if name == "lm_head.weight" else tensor
    _, _, layer, rest = name.split(".", 3)
    inner = rest.removeprefix("seq_modeling_block.")
    path = _LAYER[rest].split() if inner == rest else ["seq_modeling_block", *_INNER[inner].split()]
    if rest.endswith("_proj.weight"):
        tensor = tensor.T
    elif tensor.dim() == 3 and path[-1] == "kernel":  # a convolution
        tensor = tensor.permute(2, 1, 0)
    elif inner == "learnable_ttt_lr_weight":
        tensor = tensor.transpose(1, 2)
    return ("model", "h", layer, *path), tensor


def record(path, tensor):
    """One record of a streaming file: [path, flax's bytes of the array]."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    array = msgpack.packb((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), raw), use_bin_type=True)
    return msgpack.packb((tuple(path), msgpack.packb(msgpack.ExtType(1, array))), use_bin_type=True)


def param_records(tensors, prefix=("params", "params")):
    """The parameter records of a streaming file, in the JAX code's order (not ours)."""
    return [
        record((*prefix, *path), tensor)
        for path, tensor in sorted((to_jax(n, t) for n, t in tensors.items()), key=lambda r: r[0])
    ]


def train_state(tensors):
    """All bytes of a train state: the step, then parameters, then an optimizer with two moments."""
    moments = [
        record(("opt_state", "1", "0", m, *to_jax(n, t)[0]), t) for m in ("mu", "nu") for n, t in tensors.items()
    ]
    step = record(("step",), torch.tensor(7, dtype=torch.int32))
    count = record(("opt_state", "1", "0", "count"), torch.tensor(7, dtype=torch.int32))
    return b"".join([step, *param_records(tensors), count, *moments])
