"""The library's state as a Hugging Face Cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fastweight.mixers.attention import AttentionConfig
from fastweight.model_config import ModelConfig
from fastweight.ops.attention import AttentionState
from fastweight.state import ModelState


class FastweightCache(Cache):
    """What a model has read, as `past_key_values`. It belongs to the call it is given to, which moves it forward.

    state: the library's ModelState, None before the first token. columns: how many of `input_ids` were read, padding
    included. full_columns: how many of the last ones were tokens in every row. features: [B, 1, D], each row's last.
    A copy (`fork`, copy.deepcopy) continues on its own: states are values and nothing changes them in place.
    """

    def __init__(self, state: ModelState | None = None):
        super().__init__(layers=[])
        self.state = state
        self.columns = 0 if state is None else int(state.position.max())
        self.full_columns = 0 if state is None else int(state.position.min())
        self.features: Tensor | None = None
        self.config: ModelConfig | None = None

    def __repr__(self) -> str:
        return f"FastweightCache(columns={self.columns}, state={self.state})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.visits)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> "FastweightCache":
        return self.fork()

    def fork(self) -> "FastweightCache":
        """An independent copy: continuing one leaves the other as it is."""
        other = FastweightCache()
        other.__dict__.update(self.__dict__)
        other.layers = []
        return other

    def advance(
        self, state: ModelState, config: ModelConfig, features: Tensor, mask: Tensor | None, width: int
    ) -> None:
        """Take the state after `width` more columns; mask [B, width], None where all of them were tokens."""
        self.state, self.config, self.features = state, config, features
        self.columns += width
        full = width if mask is None else int(mask.all(0).flip(0).long().cumprod(0).sum())
        self.full_columns = full + (self.full_columns if full == width else 0)

    def take(self, state: ModelState, config: ModelConfig, features: Tensor) -> None:
        """Take the state after a packed row, one sequence per document."""
        self.__init__(state)
        self.config, self.features = config, features

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` read so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.num_sequences

    @property
    def max_batch_size(self) -> int:
        return self.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return self.config is None or can_crop(self.config)

    def activate_past_recording(self) -> None:
        """Nothing to record: a cache that can be cropped holds all of the past."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("FastweightCache holds no keys and values to update; give it to model(past_key_values=...).")

    def reset(self) -> None:
        """Forget everything, as if nothing had been read."""
        self.state = self.features = None
        self.columns = self.full_columns = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row i from what row beam_idx[i] has read."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.num_sequences).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (numbers or a mask), in that order."""
        if self.state is None:
            return
        self.state = self.state.select(indices)
        if self.features is not None:
            self.features = self.features[torch.as_tensor(indices).to(self.features.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns; a positive number says how many columns to keep.

        Exact for models of full attention alone, whose state keeps every token apart, and for forgetting everything.
        Raises ValueError for a memory, which has learned from the tokens, for a window, which has dropped older ones,
        and where a removed column was padding in some row.
        """
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.columns - tokens_to_remove, 0)
        if count == 0 or self.state is None:
            return
        if count >= self.columns:
            self.reset()
            return
        self._check_crop(count)
        blocks = tuple(block._replace(mixer=_cut(block.mixer, count)) for block in self.state.visits)
        self.state = ModelState(blocks, self.state.position - count, self.state.signature, self.state.note)
        self.columns, self.full_columns, self.features = self.columns - count, self.full_columns - count, None

    def _check_crop(self, count: int) -> None:
        if not self.is_croppable or self.config is None:
            raise ValueError(
                f"crop: this model's state cannot forget its last {count} token(s): its memory has learned from them, "
                "or a window or convolution has dropped what came before. Keep cache.fork() from before they were read."
            )
        if count > self.full_columns:
            raise ValueError(
                f"crop: only the last {self.full_columns} column(s) are tokens in every row, {count} were to go; "
                "the rest holds padding, so rows would lose different numbers of tokens. Keep cache.fork() instead."
            )


def can_crop(config: ModelConfig) -> bool:
    """Every token is kept apart in the state: full attention everywhere, no convolution or smear, no other memory."""
    mixers = [block.mixer for block in config.blocks]
    full = all(type(mixer) is AttentionConfig and mixer.window is None and not mixer.num_sinks for mixer in mixers)
    more = [block.pre_conv or (block.feed_forward and block.feed_forward.memory) for block in config.blocks]
    return full and not any(more) and not config.smear


def _cut(state: AttentionState, count: int) -> AttentionState:
    return state._replace(k=state.k[:, :-count], v=state.v[:, :-count], position=state.position - count)


def merge_rows(new: ModelState, old: ModelState, moved: Tensor) -> ModelState:
    """The state of all rows: `new` holds those where `moved` [B] is true, in order; `old` all of them."""
    place = (moved.long().cumsum(0) - 1).clamp(min=0)
    return new.select(place).where(moved, old)
