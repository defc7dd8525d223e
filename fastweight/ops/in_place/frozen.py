"""Reading without learning: the memory stays as it is."""

import torch
from torch import Tensor

from fastweight.ops.in_place import InPlaceState
from fastweight.ops.sequences import advance, sequence_lengths
from fastweight.state import map_tensors


def read_only(
    hidden: Tensor, state: InPlaceState, chunk_size: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, InPlaceState]:
    """y and the state after tokens that teach nothing: a chunk that ends among them leaves its pending sum behind."""
    if cu_seqlens is None:
        y = hidden @ state.memory.transpose(1, 2)
    else:
        parts = hidden[0].split(sequence_lengths(1, hidden.shape[1], cu_seqlens))
        y = torch.cat([part @ memory.T for part, memory in zip(parts, state.memory, strict=True)])[None]
    position = advance(state.position, hidden.shape[1], cu_seqlens)
    ended = position // chunk_size > state.position // chunk_size
    pending = state.pending.masked_fill(ended[:, None, None], 0)
    tail = map_tensors(torch.zeros_like, state.tail)
    return y, state._replace(pending=pending, tail=tail, spoiled=state.spoiled & ~ended, position=position)
