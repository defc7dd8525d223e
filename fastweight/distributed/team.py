"""The processes of one run: who this one is, and the few numbers that all must agree on."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from fastweight.configs import require
from fastweight.distributed.context import Context
from fastweight.distributed.meeting import meet
from fastweight.distributed.mesh import CONTEXT, REPLICATE, SHARD, Gather, MeshConfig

FAILED = "fastweight/failed"
LINE = 512


class Team:
    """This process among those of the run. Alone (`Team()`), every method returns what it was given.

    rank: number of this process, 0 leads: it alone writes and speaks. size: how many there are. Methods that exchange
    something must be called by all processes, in the same order.
    context: the processes that read the same sequences, a part each.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._mesh: DeviceMesh | None = None
        self.gather: Gather = "own"
        self.context = Context()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def mesh(self) -> DeviceMesh:
        """replicate × shard, after `arrange`: the processes that read the same part of their sequences."""
        assert self._mesh is not None
        return self._mesh

    @property
    def readers(self) -> int:
        """How many read sequences of their own; the processes of a context count as one."""
        return self.size // self.context.parts

    @property
    def reader(self) -> int:
        """The number of this one among them."""
        return self.rank // self.context.parts

    def arrange(self, config: MeshConfig, device: torch.device) -> None:
        """Place the processes as `config` says. Raises ValueError if their number does not fit."""
        sizes, self.gather = config.sizes(self.size), config.gather
        if self.size == 1:
            return
        if config.context == 1:
            self._mesh = init_device_mesh(device.type, sizes, mesh_dim_names=(REPLICATE, SHARD))
            return
        # Neighbours in a sequence are neighbours in number: their hand-overs are the most frequent messages.
        mesh = init_device_mesh(device.type, (*sizes, config.context), mesh_dim_names=(REPLICATE, SHARD, CONTEXT))
        self._mesh, self.context = mesh[REPLICATE, SHARD], Context(mesh.get_group(CONTEXT), config.turns)

    def sum(self, values: Sequence[int]) -> list[int]:
        """The sums of whole numbers over the processes, exchanged between their hosts."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """The same for any numbers, in double precision."""
        if self.size == 1 or not values:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def add(self, values: Tensor) -> Tensor:
        """The sums of a tensor over the processes, on its device."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def of_first(self, value: float) -> float:
        """The number that process 0 has, e.g. the time on its clock."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(number, 0)
        return number.item()

    def text_of_first(self, text: str) -> str:
        """The text that process 0 has, of at most 512 bytes."""
        data = text.encode().ljust(LINE, b"\0")
        assert len(data) == LINE
        return bytes(self.sum(list(data) if self.leads else [0] * LINE)).rstrip(b"\0").decode()

    def wait(self) -> None:
        """Go on when all have come here."""
        self.sum([0])


@contextlib.contextmanager
def joined(timeout_seconds: int) -> Iterator[Team]:
    """The team that this process belongs to: that of torchrun's environment or of an initialised process group.

    If a process fails, all end: the first one raises its error, with its number; the others, whose partner is gone,
    leave with exit code 1 and without a word.
    """
    if dist.is_available() and dist.is_initialized():
        yield Team(dist.get_rank(), dist.get_world_size())
        return
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    store = _start(rank, size, timedelta(seconds=timeout_seconds))
    try:
        yield Team(rank, size)
    except Exception as error:
        if store.add(FAILED, 1) > 1:
            raise SystemExit(1) from error
        if is_lost(error):
            raise ConnectionError(
                f"process {rank} of {size} has lost another one, or waited for it longer than mesh.timeout_seconds "
                f"({timeout_seconds}): {str(error).splitlines()[0]} Look there for the reason, then resume the run."
            ) from error
        error.add_note(f"(process {rank} of {size})")
        raise
    dist.destroy_process_group()


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process is gone, or does not answer: gloo and NCCL have no type for it."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL error")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _start(rank: int, size: int, timeout: timedelta) -> Any:
    """Join the others. Host memory goes over gloo, that of GPUs over NCCL."""
    found, *_ = next(rendezvous("env://", rank, size, timeout=timeout))
    store = meet(found, rank, size, timeout.total_seconds())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return store


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where `device` means any GPU: torchrun numbers the processes of a machine.

    Raises ValueError if this machine has fewer GPUs than processes, or if all would take the same one.
    """
    number = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or number is None:
        return device
    require(
        device.index is None or int(os.environ.get("WORLD_SIZE", "1")) == 1,
        f"device {str(device)!r} is one GPU, but each process needs its own. Use cuda or auto.",
    )
    if device.index is not None:
        return device
    count = torch.cuda.device_count()
    require(
        int(number) < count,
        f"this machine has {count} GPU(s), process {number} on it has none. Start at most {count} here, or use "
        "--device cpu.",
    )
    torch.cuda.set_device(int(number))
    return torch.device("cuda", int(number))
