"""A feed-forward whose down-projection learns while it reads: In-Place memory (arXiv:2604.06169)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from fastweight.configs import require
from fastweight.layers import FeedForward, FeedForwardConfig, InPlaceConfig, init_linears, keep_wide
from fastweight.ops.in_place import WIDTH, InPlaceState, in_place, init_in_place

PROJECTION_STD = 0.02  # of the diagonal, as published


class InPlaceWeights(nn.Module):
    """What the memory adds to a feed-forward: taps [D, 5] of the target's convolution, projection [D, D] or None.

    They are float32 or wider whatever the backbone's dtype: a conversion to a narrower one leaves them as they are.
    """

    def __init__(self, d_model: int, config: InPlaceConfig):
        super().__init__()
        self.taps = nn.Parameter(torch.zeros(d_model, WIDTH))
        self.projection = nn.Parameter(torch.zeros(d_model, d_model)) if config.projection else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero taps: nothing is learned yet, the layer is the plain feed-forward. The projection starts diagonal."""
        self.taps.zero_()
        if self.projection is not None:
            diagonal = PROJECTION_STD * torch.randn(self.projection.shape[0], device=self.projection.device)
            self.projection.copy_(diagonal.diag())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "InPlaceWeights":
        return super()._apply(lambda t: keep_wide(t, fn), recurse)


class InPlaceFeedForward(FeedForward):
    """y = down(h) + h Mᵀ with h the activations before `down` and M the memory; [B, T, D] → [B, T, D] and a state.

    It has the methods and switches of a Mixer: `backend`, `learning`, `init_state`, `parallel`, `step`. Called without
    a state it is the plain feed-forward.
    """

    ops = ("in_place",)
    has_memory = True
    learns = True

    def __init__(self, d_model: int, config: FeedForwardConfig):
        super().__init__(d_model, config)
        require(config.memory is not None, "InPlaceFeedForward: config.memory is None; give an InPlaceConfig.")
        self.settings = cast(InPlaceConfig, config.memory)
        self.memory = InPlaceWeights(d_model, self.settings)
        self.backend = "auto"
        self.learning = True

    def settled(self, state: InPlaceState) -> InPlaceState:
        return state

    def acts_at(self, position: int) -> bool:
        return (position + 1) % self.settings.chunk_size == 0

    def reset_parameters(self, init_std: float) -> None:
        init_linears(self, init_std)
        self.memory.reset_parameters()

    def init_state(self, num_sequences: int) -> InPlaceState:
        """An empty memory for each sequence. Raises ValueError for a down-projection whose weight is packed."""
        found, needed = list(self.down.weight.shape), [self.down.out_features, self.down.in_features]
        require(
            found == needed,
            f"in-place memory: the down-projection's weight must be {needed}, got {found}. If it is quantised, leave "
            "`down` out of the quantised layers, or take the memory away with remove_in_place_memory.",
        )
        return init_in_place(self.down.weight, num_sequences)

    def parallel(
        self, x: Tensor, state: InPlaceState, *, embedded: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, InPlaceState]:
        """Read x [B, T, D] (or packed [1, total, D] with cu_seqlens [N+1]) from `state` on: y and the new state.

        embedded: the embeddings of the same tokens, needed where the config's target is "embedding".
        """
        target = x if self.settings.target == "hidden" else embedded
        if target is None:
            raise ValueError('in-place feed-forward: target "embedding" needs the tokens\' embeddings, got none.')
        hidden, c = self.hidden(x), self.settings
        # The same product as without memory: an empty memory then adds nothing to the very same bits.
        base = self.down(hidden)
        read, state = in_place(
            hidden, target, self.memory.taps, self.memory.projection, self.down.weight, state,
            chunk_size=c.chunk_size, inner_lr=c.inner_lr, max_norm=c.max_norm, learn=self.learning,
            cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return (base.to(read.dtype) + read).to(base.dtype), state

    def step(self, x: Tensor, state: InPlaceState, embedded: Tensor | None = None) -> tuple[Tensor, InPlaceState]:
        """Read one token per sequence, x [B, 1, D]."""
        return self.parallel(x, state, embedded=embedded)


def make_feed_forward(d_model: int, config: FeedForwardConfig) -> FeedForward:
    """The feed-forward that a config describes, with memory or without."""
    return FeedForward(d_model, config) if config.memory is None else InPlaceFeedForward(d_model, config)
