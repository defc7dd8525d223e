"""The residual block around one mixer and a feed-forward, and its state."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    checkpointing: compute a feed-forward without a memory, and its norm, again in the backward pass.
    """

    def __init__(self, model: ModelConfig, index: int):
        super().__init__()
        config = model.blocks[index]
        self.residual, self.checkpointing = config.residual, False
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
        own = {"x0_mix": config.x0_mix, "factors": config.residual_factors, "lanes": config.residual == "lanes"}
        self.weights = ResidualWeights(d_model, feeds=feeds, visits=self.visits, **own) if config.has_weights else None

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
        """x: [B, T, D], or both lanes [2, B, T, D], which a block of residual "lanes" returns in any case.

        embedded: what the first block of the model reads, for x0 mixing and a feed-forward that learns it.
        visit: how many visits of this block came before, where each has weights of its own.
        """
        weights = self.weights
        if weights is not None:
            assert embedded is not None
            x = weights.read(x, embedded, visit)
        if self.residual == "lanes":
            return self._write_lanes(x if x.dim() == 4 else torch.stack([x, x]), state, cu_seqlens, embedded, visit)
        tail = state.conv
        if self.conv is not None and self.conv_norm is not None:
            assert tail is not None
            y, tail = causal_conv(self.conv_norm(x), self.conv.weight, self.conv.bias, tail, cu_seqlens=cu_seqlens)
            x = x + y
        y, mixer_state = self._mix(x, state.mixer, cu_seqlens, visit)
        mixed = x + y
        if self.feed_forward is None:
            return mixed, BlockState(tail, mixer_state)
        read = x if self.residual == "parallel" else mixed
        y, memory = self._feed(read, state.feed_forward, cu_seqlens, embedded, visit)
        return mixed + y, BlockState(tail, mixer_state, memory)

    def _write_lanes(
        self, lanes: Tensor, state: BlockState, cu_seqlens: Tensor | None, embedded: Tensor | None, visit: int
    ) -> tuple[Tensor, BlockState]:
        assert self.weights is not None
        mixed, mixer_state = self._mix(lanes[0], state.mixer, cu_seqlens, visit)
        fed, memory = self._feed(lanes[1], state.feed_forward, cu_seqlens, embedded, visit)
        return self.weights.write(lanes, mixed, fed, visit), BlockState(None, mixer_state, memory)

    def _mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None, visit: int) -> tuple[Tensor, Any]:
        """What the mixer adds."""
        y, state = self.mixer(self._scaled(self.mixer_norm(x)), state, cu_seqlens=cu_seqlens)
        y = self.mixer_post_norm(y)
        return (y if self.weights is None else self.weights.weigh_mixer(y, visit)), state

    def _feed(
        self, x: Tensor, memory: Any, cu_seqlens: Tensor | None, embedded: Tensor | None, visit: int
    ) -> tuple[Tensor, Any]:
        """What the feed-forward adds, and its memory."""
        if isinstance(self.feed_forward, InPlaceFeedForward):
            read = self._scaled(self.feed_forward_norm(x))
            y, memory = self.feed_forward.parallel(read, memory, embedded=embedded, cu_seqlens=cu_seqlens)
        elif self.checkpointing and torch.is_grad_enabled():
            y = checkpoint(self._fed, x, use_reentrant=False)
        else:
            y = self._fed(x)
        y = self.feed_forward_post_norm(y)
        return (y if self.weights is None else self.weights.weigh_feed_forward(y, visit)), memory

    def _fed(self, x: Tensor) -> Tensor:
        assert self.feed_forward is not None
        return self.feed_forward(self._scaled(self.feed_forward_norm(x)))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.norm_scale is None else x * self.norm_scale
