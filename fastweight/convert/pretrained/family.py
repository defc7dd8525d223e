"""What a family of pretrained decoders is: its configs as ours, and its tensor names beside ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastweight.convert.pretrained.names import Rule
from fastweight.convert.pretrained.settings import Settings
from fastweight.layers import FeedForwardConfig
from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import BlockConfig, ModelConfig


class Family(NamedTuple):
    """One family, known by the `model_type` of its config.json.

    model_config: our config for theirs. outside, inside: the tensors beside and within the blocks. layers: the name of
    block {}. head: the tensor of the output layer, which may be stored although it is the embedding again. old_head:
    its name in other versions' files. prefix: of all tensors but the head; files of the bare decoder lack it. ignored:
    endings of stored tensors that are no weights (constants that older programs saved).
    """

    name: str
    model_config: Callable[[Settings], ModelConfig]
    outside: tuple[Rule, ...]
    inside: tuple[Rule, ...]
    layers: str = "model.layers.{}."
    head: str = "lm_head.weight"
    old_head: str | None = None
    prefix: str = "model."
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


def decoder(
    c: Settings, attention: list[AttentionConfig], feed_forward: FeedForwardConfig, *, norm: str = "rms",
    norm_position: str = "pre", residual: str = "sequential", norm_eps: float, tied: bool, **more: Any,
) -> ModelConfig:  # fmt: skip
    """A model with one block per attention layer. tied: the family's default for tie_word_embeddings."""
    blocks = tuple(
        BlockConfig(mixer=mixer, feed_forward=feed_forward, norm_position=norm_position, residual=residual)
        for mixer in attention
    )
    return ModelConfig(
        vocab_size=c.size("vocab_size"), blocks=blocks, norm=norm, norm_eps=norm_eps,
        tie_embeddings=c.flag("tie_word_embeddings", tied), init_std=c.number("initializer_range", 0.02), **more,
    )  # fmt: skip
