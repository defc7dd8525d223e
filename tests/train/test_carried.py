"""Carried memories on their way between processes."""

import torch
import torch.distributed as dist
from training_cases import tiny_model

from fastweight.distributed.team import Team
from fastweight.state import map_tensors, tensors
from fastweight.train.carried import gather_rows


def test_states_travel_in_one_order_of_memory_whatever_they_were_computed_in(monkeypatch):
    _, state = tiny_model()(torch.arange(2 * 9).reshape(2, 9))
    state.visits = map_tensors(lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, state.visits)
    assert any(not t.is_contiguous() for _, t in tensors(state.visits)), "nothing was turned"
    sent = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, rank: sent.append(tensor))
    mine, _ = gather_rows([state], Team(0, 2))
    assert all(tensor.is_contiguous() for tensor in sent)
    for (name, found), (_, wanted) in zip(tensors(mine.visits), tensors(state.visits), strict=True):
        assert torch.equal(found, wanted), name
