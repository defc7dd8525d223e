"""From whole models and files to weights cut over processes, and back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastweight.configs import require
from fastweight.distributed.parts import Parts
from fastweight.distributed.shards import full, is_sharded, shard_model
from fastweight.distributed.team import Team
from fastweight.model import Model
from fastweight.optim.cut import cut_of, local
from fastweight.optim.muon import SECOND_MOMENT

# How a process is told the dtype of a weight.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def plain_model(model: Model, team: Team) -> Model:
    """`model` itself if it is not cut; else a model on the host, with all weights for the leader and none for others.

    All processes of the team must ask.
    """
    if not is_sharded(model):
        return model
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = full(tensor.detach())
        if team.leads:
            weights[name] = whole.cpu()
    with torch.device("meta"):
        plain = Model(model.config)
    plain.origin = model.origin
    if team.leads:
        plain.load_state_dict(weights, assign=True)
    return plain


def sharded_model(model: Model, team: Team, device: torch.device) -> Model:
    """A cut model with the weights that `model` has in the leader; elsewhere they may be missing (device "meta").

    No process but the leader ever holds more than one whole weight.
    """
    dtypes = torch.tensor([DTYPES.index(p.dtype) for p in model.parameters()])
    dist.broadcast(dtypes, 0)
    twin = _empty_twin(model, [DTYPES[i] for i in dtypes.tolist()], team, device)

    def fill(name: str, parameter: Tensor) -> None:
        own = model.get_parameter(name).detach()
        whole = (
            own.to(device).contiguous() if team.leads else torch.empty(own.shape, dtype=parameter.dtype, device=device)
        )
        dist.broadcast(whole, 0)
        local(parameter).copy_(whole[_rows(parameter)])

    return _filled(twin, fill)


def read_sharded_model(model: Model, parts: Parts, team: Team, device: torch.device) -> Model:
    """A cut model like `model` (whose weights may be missing), each process reading its own rows from files.

    Raises ValueError for files of another model.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    known = set(parts.names())
    wrong = [name for name, shape in wanted.items() if name not in known or parts.shape(name) != shape]
    wrong += sorted(known - wanted.keys())
    require(not wrong, f"{', '.join(wrong[:5])} missing, unknown or of another shape than the model's.")

    def fill(name: str, parameter: Tensor) -> None:
        local(parameter).copy_(parts.rows(name, _rows(parameter)))

    return _filled(_empty_twin(model, [parts.dtype(name) for name in wanted], team, device), fill)


def read_state(parts: Parts, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of the tensors "parameter" or "parameter|quantity", each cut as its parameter is.

    Quantities that every process keeps whole stay so.
    """
    found = {}
    for name in parts.names():
        parameter, _, quantity = name.rpartition("|")
        like = parameters.get(parameter or name)
        if like is None or quantity == SECOND_MOMENT or parts.shape(name) != like.shape or cut_of(like) is None:
            found[name] = parts.whole(name)
        else:
            found[name] = cut_as(like, parts.rows(name, _rows(like)))
    return found


def cut_as(like: Any, rows: Tensor) -> Tensor:
    """The tensor of the shape of `like`, which is cut, of which this process holds `rows`."""
    from torch.distributed.tensor import DTensor

    own = rows.to(like.device)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _empty_twin(model: Model, dtypes: list[torch.dtype], team: Team, device: torch.device) -> Model:
    """A cut model of the same config and settings, its weights not yet written."""
    with torch.device("meta"):
        twin = Model(model.config)
    for (name, parameter), dtype in zip(twin.named_parameters(), dtypes, strict=True):
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device="meta")
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    twin.origin = model.origin
    for own, other in zip(twin.memories(), model.memories(), strict=True):
        own.backend, own.learning = other.backend, other.learning
    shard_model(twin, team.mesh, team.gather)
    return twin.to_empty(device=device)


@torch.no_grad()
def _filled(model: Model, fill: Callable[[str, Tensor], None]) -> Model:
    for name, parameter in model.named_parameters():
        fill(name, parameter)
    return model


def _rows(parameter: Tensor) -> slice:
    """Which rows of a cut parameter this process holds."""
    cut = cut_of(parameter)
    assert cut is not None
    return cut.slice(parameter.shape[0])
