"""Groups of processes that come and go, each group with a whole copy of the model, and how they meet by torchft.

A lighthouse (torchft's own program) says at every step who is there. What one group tells another in full, its weights
and its place in the run, travels as safetensors and JSON over HTTP; torchft's own way would be a pickle.
"""

import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from fastweight.configs import require
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.team import Team
from fastweight.optim.cut import local

OTHER_RUN = (
    "replicas: another group has other settings, data, layers or processes (number or mesh). Groups that work together "
    "must be alike in all that shapes the weights; give each run a lighthouse of its own."
)


class Whole:
    """Offers one state to those that are behind, and fetches one: torchft's CheckpointTransport without pickle.

    A state is nested dicts of strings, numbers and tensors.
    """

    def __init__(self, timeout_seconds: float):
        self._held: dict[int, bytes] = {}
        self._changed = threading.Condition()
        whole = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = whole.wait_for(int(self.path.rsplit("/", 1)[-1]), timeout_seconds)
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True, name="states for other groups").start()

    def wait_for(self, step: int, seconds: float) -> bytes | None:
        """The state after `step`, once it is offered; None if it is not in time."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._held, seconds)
            return self._held.get(step)

    def metadata(self) -> str:
        """Where others find this."""
        return f"http://{socket.gethostname()}:{self._server.server_port}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Offer a copy of the state."""
        with self._changed:
            self._held = {step: encode(state_dict)}
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """All who needed it have it."""
        with self._changed:
            self._held = {}

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch the state after `step` from another group."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{metadata}/{step}", timeout=timeout.total_seconds()) as answer:
            return decode(answer.read())

    def shutdown(self, wait: bool = True) -> None:
        """Offer nothing any more."""
        self._server.shutdown()
        self._server.server_close()


def encode(state: dict[str, Any]) -> bytes:
    """A line of JSON, in which {"tensor": name} stands for a tensor, and a safetensors file with these."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"tensor": name}
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    return json.dumps(plain(state)).encode() + b"\n" + pack(tensors)


def decode(data: bytes) -> Any:
    """Read what `encode` returned."""
    line, _, rest = data.partition(b"\n")
    tensors = unpack(rest)

    def full(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return tensors[value["tensor"]] if value.keys() == {"tensor"} else {k: full(item) for k, item in value.items()}

    return full(json.loads(line))


class Quorum:
    """This group among those that are there now; who is there is settled by `begin`, for one exchange.

    A group is the processes of `team`. Each of them exchanges its part with the one of the same number in every other
    group, and all must call every method, in the same order.
    name: groups read slices in the order of their names. word: a number below 2^20 that is the same in groups that may
    work together, and most likely in no others. state, load: what this process's part of a group that is behind needs,
    and how it takes that over. first: what all groups must have alike before the first exchange. count: exchanges that
    this group has behind it. sent_bytes: what this process has given to exchanges with other groups.
    """

    def __init__(
        self,
        config: ReplicaConfig,
        team: Team,
        name: str,
        word: int,
        state: Callable[[], dict[str, Any]],
        load: Callable[[Any], None],
        first: Callable[[], Iterable[Tensor]],
        count: int,
    ):
        torchft = _import_torchft()
        self._team, self._word, self._load, self._first = team, word, load, first
        self._received: dict[str, Any] | None = None
        self._met = False
        self.sent_bytes = 0
        host, wait = socket.gethostname(), timedelta(seconds=config.timeout_seconds)
        # Alive as long as this object: processes of this group and others exchange their addresses in it.
        c10d: Any = dist
        self._store = c10d.TCPStore(host, 0, is_master=True, wait_for_workers=False) if team.leads else None
        place = team.text_of_first("" if self._store is None else f"{host} {self._store.port}").split()
        self._manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=wait),
            load_state_dict=self._receive,
            state_dict=lambda: {"word": word, **state()},
            min_replica_size=config.least,
            use_async_quorum=False,
            timeout=wait,
            quorum_timeout=timedelta(seconds=config.wait_seconds),
            rank=team.rank,
            world_size=team.size,
            store_addr=place[0],
            store_port=int(place[1]),
            lighthouse_addr=config.lighthouse,
            hostname=host,
            checkpoint_transport=Whole(config.timeout_seconds),
            # Groups are numbered in the order of this. The dot: torchft reads numbers at the end of a name.
            replica_id=f"{name}.",
            init_sync=False,
        )
        self._manager.load_state_dict({"step": count, "batches_committed": 0})

    def begin(self) -> tuple[int, int]:
        """Meet the others; a group that is behind takes over the state of one that is not. Returns (rank, size).

        Raises ValueError if that one is another run.
        """
        manager, before = self._manager, self._manager.state_dict()
        manager.start_quorum()
        self._take_over(before)
        rank, size = manager.participating_rank() or 0, max(1, manager.num_participants())
        if size > 1 and manager.current_step() == 0:
            self._start_alike(rank)
        return rank, size

    def sum(self, values: Sequence[int]) -> list[int]:
        """Whole numbers, summed over the groups; any, if the exchange fails: see `agreed`.

        Raises ValueError if another group is another run and this one has not agreed with any other yet; else the
        exchange has failed.
        """
        total = torch.tensor([*values, 1, self._word, self._word**2], dtype=torch.int64)
        self.add([total])
        *sums, size, words, squares = total.tolist()
        # Equal numbers, and no others, have n Σ x² = (Σ x)².
        if not self.failed and size * squares != words**2:
            require(self._met, OTHER_RUN)
            self._manager.report_error(ValueError(OTHER_RUN))
        return sums

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Put the sums over the groups in the places of `tensors`; anything, if the exchange fails: see `agreed`."""
        self.finish(self.start(tensors))

    def start(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Begin to `add`; until `finish`, nobody may touch the tensors."""
        tensors = [tensor for tensor in tensors if tensor.numel()]
        if self._manager.num_participants() > 1:
            self.sent_bytes += sum(tensor.nbytes for tensor in tensors)
        return [self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM) for tensor in tensors]

    def finish(self, started: list[Any]) -> None:
        """Wait for what `start` has begun."""
        for work in started:
            work.wait()

    @property
    def failed(self) -> bool:
        """Whether an exchange since `begin` is known not to be whole, by this process."""
        return self._manager.errored() is not None

    def agreed(self) -> bool:
        """Whether all exchanges since `begin` were whole, for all processes of this group, so that they count."""
        agreed = bool(self._manager.should_commit())
        self._met |= agreed
        return agreed

    def close(self) -> None:
        """Leave."""
        self._manager.shutdown(wait=False)

    def _receive(self, state: dict[str, Any]) -> None:
        self._received = state

    def _take_over(self, before: dict[str, int]) -> None:
        """Take over what has come, if every process of this group has its part; else all stay where they were, at
        `before`, and the exchange has failed."""
        received, self._received = self._received, None
        (count,) = self._team.sum([int(received is not None)])
        if count == self._team.size:
            assert received is not None
            require(received["word"] == self._word, OTHER_RUN)
            self._load(received)
        elif count:
            self._manager.load_state_dict(before)
            self._manager.report_error(ConnectionError("another process of this group did not get its part"))

    @torch.no_grad()
    def _start_alike(self, rank: int) -> None:
        """Before the first exchange: take over what the first group has."""
        own = [local(tensor) for tensor in self._first()]
        sums = [tensor.clone() if rank == 0 else torch.zeros_like(tensor) for tensor in own]
        self.add(sums)
        if not self.failed:
            for tensor, total in zip(own, sums, strict=True):
                tensor.copy_(total)


def _import_torchft() -> Any:
    try:
        import torchft
    except ImportError as error:
        raise ValueError('replicas need torchft (Linux): pip install "fastweight[ft]".') from error
    return torchft
