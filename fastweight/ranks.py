"""Several processes that do one thing: what they tell each other, and how all of them stop if one fails.

Each process is a rank of torch.distributed, or there is one alone and nothing is exchanged. Ranks meet at places with
names. Whoever fails says so at the next place, so that the others stop there with its message instead of waiting; a
rank that dies or hangs is noticed after the time-out.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 1800.0


class RankError(ConnectionError):
    """Another rank failed, died, did not answer in time, or is somewhere else."""


def num_ranks() -> int:
    """Processes that work together: 1 unless torch.distributed is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 if it is alone."""
    return dist.get_rank() if num_ranks() > 1 else 0


def launch_rank() -> int:
    """The rank that torchrun gave to this process, also before and after `joined`; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched() -> int:
    """Processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Inside, the processes that torchrun started belong together; alone, nothing happens.

    timeout_seconds: how long a rank waits for the others. Errors raised inside stop all ranks.
    Raises RankError if they do not all come.
    """
    if launched() < 2 or dist.is_initialized():
        with together("the whole"):
            yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the ranks did not find each other within {timeout_seconds:g} s: {error}") from error
    try:
        with together("the whole"):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """All ranks do `what`; afterwards all have done it, or all raise: RankError where another one failed.

    Each rank must come by, and nothing inside may exchange anything unless all ranks do.
    """
    try:
        yield
    except RankError:
        raise  # the others know already
    except Exception as error:
        if not getattr(error, "announced", False):
            error.announced = True  # type: ignore[attr-defined]  # ours, read where it is caught
            with contextlib.suppress(RankError):
                _exchange({"at": what, "error": f"{type(error).__name__}: {error}"})
        raise
    gather(what)


def gather(what: str, value: Any = None) -> list[Any]:
    """The `value` of every rank, by rank; values are what JSON can say, floats exactly.

    what: the name of this place, for messages. Raises RankError if a rank is elsewhere, has failed or does not come.
    """
    found = _exchange({"at": what, "value": value})
    for number, other in enumerate(found):
        if "error" in other:
            raise RankError(f"rank {number} failed ({other['at']}): {other['error']}")
    for number, other in enumerate(found):
        if other["at"] != what:
            raise RankError(
                f"rank {rank()} has come to {what!r}, rank {number} to {other['at']!r}; all must go one way."
            )
    return [other["value"] for other in found]


def any_rank(what: str, condition: bool) -> bool:
    """Whether `condition` holds on any rank; the same answer on all."""
    return any(gather(what, condition))


def _exchange(message: dict[str, Any]) -> list[dict[str, Any]]:
    if num_ranks() == 1:
        return [message]
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    try:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks())]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        most = int(max(sizes))
        parts = [torch.zeros(most, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.cat([data, data.new_zeros(most - len(data))]))
    except RuntimeError as error:
        what = message["at"]
        raise RankError(
            f"rank {rank()} has come to {what!r}, and another rank died or did not come in time ({error}). Look at the "
            "other ranks' messages, or allow more time."
        ) from error
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]
