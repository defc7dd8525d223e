"""TTT checkpoints: the tensor names of the PyTorch and the JAX code beside ours, and the settings all three share.

Sources: the repositories test-time-training/ttt-lm-pytorch and test-time-training/ttt-lm-jax.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastweight.configs import require
from fastweight.convert.folders import require_equal, skeleton
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.ttt import TTTConfig, TTTLinearConfig, TTTMLPConfig
from fastweight.model import BlockConfig, Model, ModelConfig, check_weights

NORM_EPS = 1e-6  # of the inner and the output layer norm; neither repository has a setting for it
EXPANSION = 4  # hidden width of the MLP memory in head widths; fixed in both


class Layout(NamedTuple):
    """How a tensor of ours is laid out elsewhere, and the way back. All four only permute or reshape."""

    to_torch: Callable[[Tensor], Tensor]
    from_torch: Callable[[Tensor], Tensor]
    to_jax: Callable[[Tensor], Tensor]
    from_jax: Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _transpose(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


COPY = Layout(_same, _same, _same, _same)
MATRIX = Layout(_same, _same, _transpose, _transpose)
# Depthwise kernels: ours [C, width], PyTorch [C, 1, width], flax [width, 1, C].
CONV = Layout(lambda t: t[:, None], lambda t: t[:, 0], lambda t: t.T[:, None], lambda t: t[:, 0].T)
# Rate of each head: ours [H, D], PyTorch [H, 1, D], flax [H, D, 1]; its bias [H], elsewhere [H, 1].
RATE = Layout(lambda t: t[:, None], lambda t: t[:, 0], lambda t: t[..., None], lambda t: t[..., 0])
RATE_BIAS = Layout(lambda t: t[:, None], lambda t: t[:, 0], lambda t: t[:, None], lambda t: t[:, 0])


class Name(NamedTuple):
    """One tensor: our name, the PyTorch name, the JAX path below the parameters, and the layouts."""

    ours: str
    torch: str
    jax: tuple[str, ...]
    layout: Layout


# Ours within a block, PyTorch within a layer, JAX within a layer. A slash inside a component belongs to the component.
_BLOCK = [
    ("conv_norm.weight", "conv.norm.weight", ("conv", "conv_norm", "kernel"), COPY),
    ("conv.weight", "conv.conv.weight", ("conv", "conv1", "kernel"), CONV),
    ("conv.bias", "conv.conv.bias", ("conv", "conv1", "bias"), COPY),
    ("mixer_norm.weight", "seq_norm.weight", ("seq_norm", "kernel"), COPY),
    ("feed_forward_norm.weight", "ffn_norm.weight", ("ffn_norm", "kernel"), COPY),
    ("feed_forward.gate.weight", "mlp.gate_proj.weight", ("feed_forward", "w1", "kernel"), MATRIX),
    ("feed_forward.up.weight", "mlp.up_proj.weight", ("feed_forward", "w3", "kernel"), MATRIX),
    ("feed_forward.down.weight", "mlp.down_proj.weight", ("feed_forward", "w2", "kernel"), MATRIX),
]
_MIXER = [
    ("q.weight", "q_proj.weight", ("wq", "kernel"), MATRIX),
    ("k.weight", "k_proj.weight", ("wk", "kernel"), MATRIX),
    ("v.weight", "v_proj.weight", ("wv", "kernel"), MATRIX),
    ("o.weight", "o_proj.weight", ("wo", "kernel"), MATRIX),
    ("gate.weight", "g_proj.weight", ("wg", "kernel"), MATRIX),
    ("q_conv.weight", "conv_q.weight", ("conv_q", "kernel"), CONV),
    ("q_conv.bias", "conv_q.bias", ("conv_q", "bias"), COPY),
    ("k_conv.weight", "conv_k.weight", ("conv_k", "kernel"), CONV),
    ("k_conv.bias", "conv_k.bias", ("conv_k", "bias"), COPY),
    ("inner_lr.weight", "learnable_ttt_lr_weight", ("learnable_ttt_lr/kernel",), RATE),
    ("inner_lr.bias", "learnable_ttt_lr_bias", ("learnable_ttt_lr/bias",), RATE_BIAS),
    ("token_index", "learnable_token_idx", ("learnable_token_idx",), COPY),
    ("ln_weight", "ttt_norm_weight", ("ttt_norm/scale",), COPY),
    ("ln_bias", "ttt_norm_bias", ("ttt_norm/bias",), COPY),
    ("w1", "W1", ("ttt_dense_0",), COPY),
    ("b1", "b1", ("ttt_bias_0",), COPY),
    ("w2", "W2", ("ttt_dense_1",), COPY),
    ("b2", "b2", ("ttt_bias_1",), COPY),
    ("out_norm.weight", "post_norm.weight", ("post_norm", "scale"), COPY),
    ("out_norm.bias", "post_norm.bias", ("post_norm", "bias"), COPY),
]


def names(config: ModelConfig) -> dict[str, Name]:
    """Our tensor name → its names elsewhere, for every tensor of a TTT model, in our order."""
    found = [
        Name("embedding.weight", "model.embed_tokens.weight", ("model", "wte", "embedding"), COPY),
        Name("norm.weight", "model.norm.weight", ("model", "ln_f", "kernel"), COPY),
        Name("head.weight", "lm_head.weight", ("lm_head", "kernel"), MATRIX),
    ]
    for i in range(len(config.blocks)):
        inner = [(f"mixer.{o}", f"seq_modeling_block.{t}", ("seq_modeling_block", *j), x) for o, t, j, x in _MIXER]
        found += [
            Name(f"blocks.{i}.{ours}", f"model.layers.{i}.{theirs}", ("model", "h", str(i), *path), layout)
            for ours, theirs, path, layout in _BLOCK + inner
        ]
    table = {name.ours: name for name in found}
    return {ours: table[ours] for ours in skeleton(config).state_dict()}


def fill(config: ModelConfig, source: str, found: dict[Any, Tensor], *, jax: bool) -> Model:
    """The model with the tensors `found` (by PyTorch name or JAX path), which must be all of its own and no other.

    `found` is emptied, so that no tensor is held twice.
    """
    model = skeleton(config)
    shapes, ours = model.state_dict(), {}
    for name in names(config).values():
        to, back, key = _ways(name, jax)
        ours[key] = (name.ours, back, tuple(to(shapes[name.ours]).shape))
    show = "/".join if jax else str
    check_weights(source, {show(k): t for k, t in found.items()}, {show(k): shape for k, (_, _, shape) in ours.items()})
    weights = {}
    for key, (name, back, _) in ours.items():
        weights[name] = back(found.pop(key)).contiguous()
    model.load_state_dict(weights, assign=True)
    return model


def spread(model: Model, *, jax: bool) -> dict[Any, Tensor]:
    """The model's tensors under their names elsewhere, in our order; views, not always contiguous."""
    weights, out = model.state_dict(), {}
    for name in names(model.config).values():
        to, _, key = _ways(name, jax)
        out[key] = to(weights[name.ours].detach().cpu())
    return out


def _ways(name: Name, jax: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Any]:
    if jax:
        return name.layout.to_jax, name.layout.from_jax, name.jax
    return name.layout.to_torch, name.layout.from_torch, name.torch


class Settings(NamedTuple):
    """What a TTT model is, in one place, whatever the code that holds it."""

    vocab_size: int
    d_model: int
    hidden: int
    num_layers: int
    num_heads: int
    mini_batch_size: int
    base_lr: float
    mlp: bool
    share_qk: bool
    gate: bool
    pre_conv: bool
    conv_width: int
    rope_base: float
    rms_norm_eps: float
    init_std: float
    tied: bool

    def to_config(self) -> ModelConfig:
        cls = TTTMLPConfig if self.mlp else TTTLinearConfig
        mixer = cls(
            num_heads=self.num_heads,
            mini_batch_size=self.mini_batch_size,
            base_lr=self.base_lr,
            share_qk=self.share_qk,
            conv_width=self.conv_width,
            gate=self.gate,
            rope_base=self.rope_base,
            norm_eps=NORM_EPS,
        )
        feed_forward = FeedForwardConfig(kind="swiglu", hidden=self.hidden)
        block = BlockConfig(mixer=mixer, feed_forward=feed_forward, pre_conv=self.conv_width if self.pre_conv else 0)
        return ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            blocks=(block,) * self.num_layers,
            norm_eps=self.rms_norm_eps,
            tie_embeddings=self.tied,
            init_std=self.init_std,
        )

    @staticmethod
    def of(config: ModelConfig, format: str) -> "Settings":
        """The settings of a model. Raises ValueError, naming the reason, for one that this format cannot hold."""
        block = config.blocks[0]
        mixer, feed_forward = block.mixer, block.feed_forward
        require(isinstance(mixer, TTTConfig), f"{format} holds TTT models; this one's first block is a {mixer.kind}.")
        assert isinstance(mixer, TTTConfig)
        require(feed_forward is not None, f"{format} needs a feed-forward in every block; block 0 has none.")
        assert feed_forward is not None
        settings = Settings(
            config.vocab_size, config.d_model, feed_forward.hidden, len(config.blocks), mixer.num_heads,
            mixer.mini_batch_size, mixer.base_lr, isinstance(mixer, TTTMLPConfig), mixer.share_qk, mixer.gate,
            block.pre_conv > 0, mixer.conv_width, mixer.rope_base, config.norm_eps, config.init_std,
            config.tie_embeddings,
        )  # fmt: skip
        # Whatever else the model says must be what every model of this format is.
        require_equal(format, config, settings.to_config())
        return settings
