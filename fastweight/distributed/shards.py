"""A model's weights cut over processes: each block is put together while it computes, and only then (FSDP2)."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastweight.distributed.mesh import SHARD, Gather
from fastweight.model import Model
from fastweight.state import ModelState

# FSDP takes more than a second to import, which runs of one process need not wait for; so what has been cut is known by
# its methods.


class Start:
    """In place of a block's state: `count` sequences start anew, but for those that go on from `carried`.

    The block makes the state itself, where it has its weights at hand. keep: bool [N], which rows go on.
    """

    def __init__(self, count: int, carried: Any = None, keep: Tensor | None = None):
        self.count, self.carried, self.keep = count, carried, keep

    def state(self, block: Any) -> Any:
        fresh = block.init_state(self.count)
        if self.keep is None:
            return fresh
        position = torch.zeros(self.count, dtype=torch.int64, device=self.keep.device)
        carried, fresh = (ModelState((visit,), position, "") for visit in (self.carried, fresh))
        return carried.where(self.keep, fresh).visits[0]


class Sealed:
    """A state on its way out of a block, so that FSDP puts no hooks on it: no gradient comes back through it."""

    def __init__(self, state: Any):
        self.state = state


def shard_model(model: Model, mesh: DeviceMesh, gather: Gather = "own") -> None:
    """Cut the weights of `model`, the same on every process, over the last dimension of `mesh`, in place.

    gather: dtype in which a block's weights are put together; embedding and head keep their own.

    Gradients are sums over all processes. Parameters become DTensors; `full` puts one together. Memories that a
    sequence starts with are made inside the blocks.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    for block in model.blocks:
        block.register_forward_hook(_seal)
        _shard(block, mesh, torch.bfloat16 if gather == "bfloat16" else None)
        block.register_forward_pre_hook(_begin)
        block.register_forward_hook(_open)
    # The host asks for the next block's weights before it starts what this one computes: launching that takes it about
    # as long as the device needs, so that otherwise each block waits for its weights.
    order: list[Any] = [model.blocks[i] for i in dict.fromkeys(model.visits)]
    for block, following in itertools.pairwise(order):
        block.set_modules_to_forward_prefetch([following])
    _shard(model, mesh, None)
    for method in ("features", "logits"):
        register_fsdp_forward_method(model, method)
    model.init_state = lambda num_sequences: _start(model, num_sequences)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has cut the weights of `model`."""
    return hasattr(model, "reshard")


def go_on(model: Model, carried: ModelState, keep: Tensor) -> ModelState:
    """The state from which the rows `keep` [N] go on, while the others start anew."""
    if not is_sharded(model):
        return carried.where(keep, model.init_state(carried.num_sequences))
    visits = tuple(Start(carried.num_sequences, visit, keep) for visit in carried.visits)
    last = None if carried.last is None else torch.where(keep.view(-1, 1, 1), carried.last, 0)
    return ModelState(visits, torch.where(keep, carried.position, 0), carried.signature, carried.note, last)


def reshard(model: nn.Module) -> None:
    """After a forward pass that no backward pass follows: let go of the weights that it has put together."""
    if is_sharded(model):
        model.reshard()  # type: ignore[operator]  # untyped: it came with FSDP


@contextlib.contextmanager
def whole(model: Model) -> Iterator[None]:
    """Inside, every process holds all weights of `model`, as plain tensors."""
    parts: list[Any] = [part for part in model.modules() if is_sharded(part)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be cut; all processes must ask."""
    return tensor.full_tensor() if _is_cut(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of the whole `tensor`, if `like` is cut; without communication."""
    if not _is_cut(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    cut: Any = like
    return distribute_tensor(tensor.to(like.device), cut.device_mesh, cut.placements, src_data_rank=None)


def _is_cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _shard(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = dtype is not None or any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    reduced = torch.float32 if narrow else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
    sharded: Any = fully_shard(module, mesh=mesh if mesh.size(0) > 1 else mesh[SHARD], mp_policy=policy)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _start(model: Model, num_sequences: int) -> ModelState:
    """What `Model.init_state` says, the blocks' parts of it still to be made."""
    visits = tuple(Start(num_sequences) for _ in model.visits)
    weight, width = model.embedding.weight, model.config.d_model
    position = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
    last = None
    if model.smear is not None:
        last = torch.zeros(num_sequences, 1, width, dtype=weight.dtype, device=weight.device)
    return ModelState(visits, position, model.signature, last=last)


def _begin(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, state, *rest = args
    return (x, state.state(block) if isinstance(state, Start) else state, *rest)


def _seal(block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Sealed]:
    x, state = output
    return x, Sealed(state)


def _open(block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Sealed]) -> tuple[Tensor, Any]:
    x, sealed = output
    return x, sealed.state
