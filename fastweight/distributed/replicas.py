"""Groups of processes that come and go, each with a whole copy of the model, and how they meet by torchft.

A lighthouse (torchft's own program) says at every step who is there. What one group tells another in full, its weights
and its place in the run, travels as safetensors and JSON over HTTP; torchft's own way would be a pickle.
"""

import json
import socket
import threading
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch.distributed as dist
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from fastweight.distributed.mesh import ReplicaConfig


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
    """This group among those that are there now; who is there is settled by `begin`, for one step.

    state, load: what a group that is behind needs, and how it takes that over. step: updates that this one has made.
    """

    def __init__(
        self, config: ReplicaConfig, state: Callable[[], dict[str, Any]], load: Callable[[Any], None], step: int
    ):
        torchft = _import_torchft()
        host, wait = socket.gethostname(), timedelta(seconds=config.timeout_seconds)
        # Alive as long as this object: other groups exchange their addresses in it.
        c10d: Any = dist
        self._store = c10d.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=wait),
            load_state_dict=load,
            state_dict=state,
            min_replica_size=config.least,
            use_async_quorum=False,
            timeout=wait,
            quorum_timeout=wait,
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=config.lighthouse,
            hostname=host,
            checkpoint_transport=Whole(config.timeout_seconds),
        )
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def begin(self) -> tuple[int, int]:
        """Meet the others; a group that is behind takes over the state of one that is not. Returns (rank, size)."""
        self._manager.start_quorum()
        return self._manager.participating_rank() or 0, max(1, self._manager.num_participants())

    def add(self, tensor: Tensor) -> None:
        """Put the sum over the groups in the place of `tensor`; anything, if the exchange fails: see `agreed`."""
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()

    def agreed(self) -> bool:
        """Whether all exchanges since `begin` were whole, so that the step counts."""
        return bool(self._manager.should_commit())

    def close(self) -> None:
        """Leave."""
        self._manager.shutdown(wait=False)


def _import_torchft() -> Any:
    try:
        import torchft
    except ImportError as error:
        raise ValueError('replicas need torchft (Linux): pip install "fastweight[ft]".') from error
    return torchft
