"""The residual block around one mixer and a feed-forward, and its state."""

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastweight.in_place import InPlaceFeedForward, make_feed_forward
from fastweight.layers import ShortConv, make_norm
from fastweight.mixers import Mixer, mixer_class
from fastweight.model_config import ModelConfig
from fastweight.ops.conv import causal_conv
from fastweight.residual import ResidualWeights
from fastweight.state import register_state


@register_state
class BlockState(NamedTuple):
    """conv: tail of the pre-convolution [N, width - 1, D] or None. mixer, feed_forward: their states."""

    conv: Tensor | None
    mixer: Any
    feed_forward: Any = None


class Block(nn.Module):
    """Residual block `index` of a model: one mixer and a feed-forward.

    norm_scale: constant factor on what the norms before mixer and feed-forward say.
    """

    def __init__(self, model: ModelConfig, index: int):
        super().__init__()
        config = model.blocks[index]
        self.residual = config.residual
        d_model, make = model.d_model, partial(make_norm, model.norm, model.d_model, model.norm_eps)
        pre, post, feeds = config.norm_position != "post", config.norm_position != "pre", bool(config.feed_forward)
        self.conv_norm = make() if config.pre_conv else None
        self.conv = ShortConv(d_model, config.pre_conv) if config.pre_conv else None
        self.mixer_norm = make() if pre else nn.Identity()
        self.mixer = mixer_class(config.mixer.kind)(d_model, config.mixer)
        self.mixer_post_norm = make() if post else nn.Identity()
        self.feed_forward_norm = make() if pre and feeds else nn.Identity()
        self.feed_forward = make_feed_forward(d_model, config.feed_forward) if config.feed_forward else None
        self.feed_forward_post_norm = make() if post and feeds else nn.Identity()
        self.norm_scale = (index + 1) ** -0.5 if model.depth_scaled_norms else None
        self.visits = model.visits.count(index) if config.per_visit else 1
        weighted = config.x0_mix or config.residual_factors != "none"
        self.weights = (
            ResidualWeights(
                d_model, x0_mix=config.x0_mix, factors=config.residual_factors, feeds=feeds, visits=self.visits
            )
            if weighted
            else None
        )

    def init_state(self, num_sequences: int) -> BlockState:
        tail = None if self.conv is None else self.conv.init_tail(num_sequences)
        feed_forward = self.feed_forward if isinstance(self.feed_forward, InPlaceFeedForward) else None
        return BlockState(
            tail,
            self.mixer.init_state(num_sequences),
            None if feed_forward is None else feed_forward.init_state(num_sequences),
        )

    def settled(self, state: BlockState) -> BlockState | None:
        """See `Mixer.settled`."""
        mixer = self.mixer.settled(state.mixer)
        return None if mixer is None else state._replace(mixer=mixer)

    def memories(self) -> list[Mixer | InPlaceFeedForward]:
        """The parts that have an op and may learn: the mixer, and the feed-forward if it has a memory."""
        return [self.mixer] + ([self.feed_forward] if isinstance(self.feed_forward, InPlaceFeedForward) else [])

    def forward(
        self, x: Tensor, state: BlockState, cu_seqlens: Tensor | None, embedded: Tensor | None = None, visit: int = 0
    ) -> tuple[Tensor, BlockState]:
        """embedded: what the first block of the model reads, for x0 mixing and a feed-forward that learns it.

        visit: how many visits of this block came before, where each has weights of its own.
        """
        tail, memory, weights = state.conv, state.feed_forward, self.weights
        if weights is not None:
            assert embedded is not None
            x = weights.read(x, embedded, visit)
        if self.conv is not None and self.conv_norm is not None:
            assert tail is not None
            y, tail = causal_conv(self.conv_norm(x), self.conv.weight, self.conv.bias, tail, cu_seqlens=cu_seqlens)
            x = x + y
        y, mixer_state = self.mixer(self._scaled(self.mixer_norm(x)), state.mixer, cu_seqlens=cu_seqlens)
        y = self.mixer_post_norm(y)
        mixed = x + (y if weights is None else weights.weigh_mixer(y, visit))
        if self.feed_forward is None:
            return mixed, BlockState(tail, mixer_state)
        read = self._scaled(self.feed_forward_norm(x if self.residual == "parallel" else mixed))
        if isinstance(self.feed_forward, InPlaceFeedForward):
            y, memory = self.feed_forward.parallel(read, memory, embedded=embedded, cu_seqlens=cu_seqlens)
        else:
            y = self.feed_forward(read)
        y = self.feed_forward_post_norm(y)
        y = y if weights is None else weights.weigh_feed_forward(y, visit)
        return mixed + y, BlockState(tail, mixer_state, memory)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.norm_scale is None else x * self.norm_scale
