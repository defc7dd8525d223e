"""The whole of what lies cut over processes: for writing it down, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastweight.distributed.shards import cut_like, full, is_sharded
from fastweight.distributed.team import Team
from fastweight.model import Model
from fastweight.optim.muon import SECOND_MOMENT


def plain_model(model: Model, team: Team) -> Model:
    """`model` itself if it is not cut; else a model on the host, with all weights for the leader and none for others.

    All processes of the team must ask.
    """
    if not is_sharded(model):
        return model
    weights = gather(model.state_dict(), team)
    with torch.device("meta"):
        plain = Model(model.config)
    plain.origin = model.origin
    if team.leads:
        plain.load_state_dict(weights, assign=True)
    return plain


def gather(named: dict[str, Tensor], team: Team) -> dict[str, Tensor]:
    """The tensors put together, on the host of the leader; the others get nothing. All processes must ask.

    Alone, the tensors as they are.
    """
    if team.size == 1:
        return named
    found = {}
    for name, tensor in named.items():
        whole = full(tensor.detach())
        if team.leads:
            found[name] = whole.cpu()
    return found


def cut_state(named: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of whole tensors "parameter" or "parameter|quantity", each cut as its parameter is.

    Quantities that every process keeps whole stay so.
    """
    cut = {}
    for name, tensor in named.items():
        parameter, _, quantity = name.rpartition("|")
        like = parameters.get(parameter or name)
        stays = like is None or quantity == SECOND_MOMENT or tensor.shape != like.shape
        cut[name] = tensor if stays else cut_like(tensor, like)
    return cut
