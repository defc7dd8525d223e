"""Padded batches at the door: checked, unpacked into `cu_seqlens`, and spread over their columns again."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.hf.cache import merge_rows
from fastweight.model import Model
from fastweight.state import ModelState

IGNORED = -100  # the label that Hugging Face losses skip


def new_columns(attention_mask: Tensor | None, shape: tuple[int, int], past: int) -> Tensor | None:
    """The mask [B, T] (bool) of the columns of this call, or None if all of them are tokens.

    attention_mask: [B, T], or [B, past + T] with the columns that the cache has read before them; 1 for a token.
    """
    if attention_mask is None:
        return None
    batch, width = shape
    sizes = sorted({width, past + width})
    require(
        attention_mask.dim() == 2 and attention_mask.shape[0] == batch and attention_mask.shape[1] in sizes,
        f"attention_mask must be [{batch}, {' or '.join(map(str, sizes))}] with 1 for tokens and 0 for padding, got "
        f"{list(attention_mask.shape)}.",
    )
    columns = attention_mask[:, -width:]
    mask = columns.bool()
    require(
        bool((columns == mask).all()),
        "attention_mask must hold 0 (padding) and 1 (token) only; additive masks do not fit.",
    )
    return None if bool(mask.all()) else mask


class Read(NamedTuple):
    """features: [B, T, D]; at padding those of the token before it, zeros where there is none. state: after them."""

    features: Tensor
    state: ModelState


def read_padded(model: Model, ids: Tensor, mask: Tensor, state: ModelState | None, before: Tensor | None) -> Read:
    """Read the tokens of ids [B, T] where mask [B, T] is true; padding is never read.

    state: of B sequences. before: [B, 1, D], the features that precede each row's first column, None for zeros.
    """
    state = model.init_state(ids.shape[0]) if state is None else state
    first = ids.new_zeros(ids.shape[0], 1, model.config.d_model, dtype=model.embedding.weight.dtype)
    first = first if before is None else before.to(first.dtype)
    lengths = mask.sum(1)
    moved = lengths > 0
    if not bool(moved.any()):
        return Read(first.expand(-1, ids.shape[1], -1), state)
    cu_seqlens = torch.nn.functional.pad(lengths[moved].cumsum(0), (1, 0))
    some = state if bool(moved.all()) else state.select(moved)
    packed, some = model.features(ids[mask][None], some, cu_seqlens)
    state = some if bool(moved.all()) else merge_rows(some, state, moved)
    # Row of the flat table that each column shows: its own token, the one before it, or the row's entry in `first`.
    count = mask.long().cumsum(1)
    starts = (lengths.cumsum(0) - lengths)[:, None]
    table = torch.cat([packed[0], first[:, 0].to(packed.dtype)])
    empty = packed.shape[1] + torch.arange(ids.shape[0], device=ids.device)[:, None]
    return Read(table[torch.where(count > 0, starts + count - 1, empty)], state)


def document_offsets(position_ids: Tensor) -> Tensor | None:
    """cu_seqlens of a packed row from position_ids [1, T] that start again at 0, or None if they do so only once."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    if starts.numel() < 2 or int(starts[0]) != 0:
        return None
    return torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1])


def check_positions(
    position_ids: Tensor,
    mask: Tensor | None,
    shape: tuple[int, int],
    state: ModelState | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse positions other than the ones that the state counts; those of padding are not looked at."""
    require(
        position_ids.dim() == 2 and position_ids.shape[0] in (1, shape[0]) and position_ids.shape[1] == shape[1],
        f"position_ids must be {list(shape)}, got {list(position_ids.shape)}.",
    )
    tokens = torch.ones(shape, dtype=torch.bool, device=position_ids.device) if mask is None else mask
    want = tokens.long().cumsum(1) - 1
    past = torch.zeros(1, dtype=torch.int64) if state is None else state.position
    if cu_seqlens is None:
        want = want + past.to(want.device)[:, None]
    else:
        starts = past.to(want.device) - cu_seqlens[:-1]
        want = want + starts.expand(cu_seqlens.numel() - 1).repeat_interleave(cu_seqlens.diff())
    wrong = (position_ids != want) & tokens
    if not bool(wrong.any()):  # not `require`: its message would list all positions at every call
        return
    row, column = wrong.nonzero()[0].tolist()
    raise ValueError(
        "position_ids must count the tokens of each sequence from 0 on, padding left out, continuing where the cache "
        f"stands; row {row} has {int(position_ids.expand(shape)[row, column])} in column {column}, need "
        f"{int(want[row, column])}. Leave position_ids out: the state counts. Several documents in one row need "
        "cu_seqlens, in a batch of one row without padding."
    )


def own_labels(labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Labels [B, T] with those dropped that no token of the same sequence predicts: padding and first tokens."""
    if cu_seqlens is not None:
        return labels.index_fill(1, cu_seqlens[:-1].long(), IGNORED)
    if mask is None:
        return labels
    first = mask & (mask.long().cumsum(1) == 1)
    return labels.masked_fill(~mask | first, IGNORED)
