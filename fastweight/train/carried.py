"""Memories that go on from step to step, in the order of the batch's rows, whatever processes and micro-batches."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastweight.distributed.team import Team
from fastweight.state import ModelState, map_tensors, zip_tensors


def gather_rows(states: list[ModelState] | None, team: Team) -> list[ModelState] | None:
    """The states of all processes in their order; all processes must ask."""
    if states is None or team.size == 1:
        return states
    return [state for rank in range(team.size) for state in _of_rank(states, rank, team)]


def deal_rows(states: Sequence[ModelState], rows: int, pieces: int, rank: int) -> list[ModelState]:
    """The states of the `pieces` micro-batches of `rows` rows of process `rank`, out of those of the whole batch."""
    together = _cat(states) if len(states) > 1 else states[0]
    starts = [(rank * pieces + i) * rows for i in range(pieces)]
    return [together.select(range(start, start + rows)) for start in starts]


def _of_rank(states: list[ModelState], rank: int, team: Team) -> list[ModelState]:
    def sent(tensor: Tensor) -> Tensor:
        # A message is what lies in memory: in one order, whatever each process has computed its state in.
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        tensor = new.copy_(tensor) if team.rank == rank else new
        dist.broadcast(tensor, rank)
        return tensor

    return [_rebuilt(state, map_tensors(sent, _tree(state))) for state in states]


def _cat(states: Sequence[ModelState]) -> ModelState:
    return _rebuilt(states[0], zip_tensors(lambda *rows: torch.cat(rows), *map(_tree, states)))


def _tree(state: ModelState) -> tuple:
    return state.visits, state.position, state.last


def _rebuilt(like: ModelState, tree: tuple) -> ModelState:
    visits, position, last = tree
    return ModelState(visits, position, like.signature, like.note, last)
