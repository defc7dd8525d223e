"""How the processes of one start find each other in a store that remembers earlier starts.

torchrun keeps its store when it starts processes again, and what dead ones have put there, their addresses among it,
stays. So each process brings a new word, process 0 reads out those of all, and who hears its own answers. Nobody
answers a dead leader, which does not know its word, and no leader counts the answer of a dead process.
"""

import secrets
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

FOLDER, NOTHING = "fastweight/meeting", "-"
LOOK_SECONDS = 0.02


def meet(
    store: Any,
    rank: int,
    size: int,
    timeout_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """The part of `store` that belongs to the processes that were started together. All of them must call it.

    Raises ConnectionError if one of them does not come.
    """
    word, deadline = secrets.token_hex(8), clock() + timeout_seconds
    store.set(f"{FOLDER}/word/{rank}", word)
    while not (name := _lead(store, word, size) if rank == 0 else _follow(store, word, rank)):
        if clock() >= deadline:
            raise ConnectionError(
                f"process {rank} of {size} has waited mesh.timeout_seconds ({timeout_seconds:g}) for the others to "
                "start. Look there for the reason."
            )
        sleep(LOOK_SECONDS)
    # Public, but not in the list of names that the package declares.
    return getattr(dist, "PrefixStore")(f"fastweight/{name}", store)  # noqa: B009


def _lead(store: Any, word: str, size: int) -> str:
    """Read out the words that are there; this leader's own once everybody has answered it."""
    words = [_read(store, f"word/{rank}") for rank in range(size)]
    store.set(f"{FOLDER}/read-out", " ".join(words))
    answers = {_read(store, f"answer/{rank}") for rank in range(1, size)}
    return word if answers == {word} else ""


def _follow(store: Any, word: str, rank: int) -> str:
    """Answer the leader that has read out this process's word, and return the leader's."""
    words = _read(store, "read-out").split(" ")
    if rank >= len(words) or words[rank] != word:
        return ""
    store.set(f"{FOLDER}/answer/{rank}", words[0])
    return words[0]


def _read(store: Any, name: str) -> str:
    key = f"{FOLDER}/{name}"
    return store.get(key).decode() if store.check([key]) else NOTHING
