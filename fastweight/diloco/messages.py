"""What workers and syncer write for each other, and how each is checked. A worker writes below workers/NAME alone.

workers/NAME/beat.json: that the worker lives, which run, model and data it has, its speed. workers/NAME/push/L.A.json
and .safetensors: its push for lease L, attempt A. orders/NAME.json: the syncer's answer. With keys, beats and pushes
are signed. Everything that comes from a worker is checked before it is used, and read up to a limit only.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.configs import from_dict, from_nested, require
from fastweight.diloco.codecs import codec
from fastweight.diloco.ledger import Lease
from fastweight.diloco.seals import (
    SIGNATURE,
    check_signature,
    digest,
    from_bytes,
    is_finite,
    pack,
    sign,
    to_bytes,
    unpack,
)
from fastweight.diloco.storage import Storage

WORKERS, ORDERS = "workers", "orders"
RECORD_LIMIT = 1 << 14
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PUSH = re.compile(r"(\d{8})\.(\d{1,3})\.json")


def check_worker_name(name: str) -> None:
    """Raise ValueError unless `name` can be a folder's."""
    require(
        _NAME.fullmatch(name) is not None,
        f"worker {name!r}: a name has 1 to 64 letters, digits, points, dashes or underscores and starts with one of "
        "the first two.",
    )


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life. count: rises; incarnation: names the process. seconds_per_step: 0 before it is known.

    steps, bytes_read, bytes_written: what this process has done and moved so far.
    """

    worker: str
    incarnation: str
    count: int
    run: str
    layout: str
    data: str
    seconds_per_step: float = 0.0
    steps: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What a push says about itself. version: merges of the fragment that it started from. tokens: since then.

    loss_nats: mean over the lease, for the record.
    """

    worker: str
    incarnation: str
    run: str
    layout: str
    lease: int
    attempt: int
    fragment: int
    version: int
    tokens: int
    codec: str
    size: int
    sha256: str
    loss_nats: float

    def next_attempt(self, attempt: int) -> "Envelope":
        """The same push, to be written once more."""
        return replace(self, attempt=attempt)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The syncer's answer to a worker.

    lease: the open one, None if there is none. versions: merges of each fragment. answered, outcome: the worker's last
    lease that was settled, and how ("merged", or a reason). again: uploads of the open lease that could not be read.
    refused: why the worker gets no leases. finished: the run is over.
    """

    incarnation: str
    versions: tuple[int, ...]
    lease: Lease | None = None
    answered: int = 0
    outcome: str = ""
    again: int = 0
    refused: str = ""
    finished: bool = False
    format: str = field(default="fastweight-order-1")


def write_beat(storage: Storage, beat: Beat, key: bytes | None) -> None:
    """Show that a worker lives."""
    storage.write(f"{WORKERS}/{beat.worker}/beat.json", to_bytes(sign(asdict(beat), key)))


def raw_beat(storage: Storage, worker: str) -> bytes | None:
    """A worker's sign of life as it lies there, None if there is none. Raises ValueError if it is too long."""
    return storage.read_if_there(f"{WORKERS}/{worker}/beat.json", RECORD_LIMIT)


def parse_beat(data: bytes, worker: str, key: bytes | None) -> Beat:
    """Read a sign of life. Raises ValueError if it is damaged or not by this worker's key."""
    name = f"{WORKERS}/{worker}/beat.json"
    beat: Beat = from_dict(Beat, _checked(data, key, name))
    require(beat.worker == worker, f"{name}: it was written by worker {beat.worker!r}.")
    require(0 <= beat.seconds_per_step < 1e9, f"{name}: {beat.seconds_per_step} seconds per step are not possible.")
    return beat


def write_order(storage: Storage, worker: str, order: Order) -> None:
    """Answer a worker."""
    storage.write(f"{ORDERS}/{worker}.json", to_bytes(asdict(order)))


def read_order(storage: Storage, worker: str) -> Order | None:
    """The syncer's answer, None before the first."""
    data = storage.read_if_there(f"{ORDERS}/{worker}.json")
    if data is None:
        return None
    return from_nested(Order, from_bytes(data, f"the order for {worker}"), "order")


class Outgoing(NamedTuple):
    """A push that is ready to be written."""

    envelope: Envelope
    data: bytes


def write_push(storage: Storage, outgoing: Outgoing, key: bytes | None) -> None:
    """Write a push, the envelope last: it is there when the tensors are."""
    base = push_name(outgoing.envelope.worker, outgoing.envelope.lease, outgoing.envelope.attempt)
    storage.write(f"{base}.safetensors", outgoing.data)
    storage.write(f"{base}.json", to_bytes(sign(asdict(outgoing.envelope), key)))


def push_name(worker: str, lease: int, attempt: int) -> str:
    """Where a push lies, without the endings."""
    return f"{WORKERS}/{worker}/push/{lease:08d}.{attempt}"


def listed_pushes(storage: Storage, worker: str) -> list[tuple[int, int]]:
    """(lease, attempt) of each envelope of a worker that is there."""
    found = (_PUSH.fullmatch(name) for name in storage.names(f"{WORKERS}/{worker}/push"))
    return [(int(match[1]), int(match[2])) for match in found if match]


class Wanted(NamedTuple):
    """What a push must agree with. sizes: entries of each fragment."""

    run: str
    layout: str
    codec: str
    sizes: list[int]
    versions: list[int]
    max_age: int
    max_tokens: int


class UnreadableError(ValueError):
    """A push that does not prove that it is its worker's, or did not arrive whole; it may be sent again."""


class StaleError(ValueError):
    """A push that started too long ago: no fault of its worker."""


def read_push(storage: Storage, worker: str, lease: int, attempt: int, key: bytes | None, limit: int) -> Outgoing:
    """Read a push. Raises UnreadableError unless it is whole and its worker's. limit: the most bytes of its tensors."""
    base = push_name(worker, lease, attempt)
    try:
        data = storage.read(f"{base}.json", RECORD_LIMIT)
        envelope: Envelope = from_dict(Envelope, _checked(data, key, base))
        own = (envelope.worker, envelope.lease, envelope.attempt) == (worker, lease, attempt)
        require(own, f"{base}: the envelope is that of another push.")
        tensors = storage.read(f"{base}.safetensors", limit)
        whole = (len(tensors), digest(tensors)) == (envelope.size, envelope.sha256)
        require(whole, f"{base}: {len(tensors)} bytes arrived that are not the {envelope.size} bytes that were sent.")
    except (ValueError, FileNotFoundError) as error:
        raise UnreadableError(str(error)) from error
    return Outgoing(envelope, tensors)


def decode_push(pushed: Outgoing, lease: Lease, wanted: Wanted) -> Tensor:
    """The pseudo-gradient of a push. Raises ValueError, naming the reason, if it must not be merged; see StaleError."""
    e = pushed.envelope
    require(e.run == wanted.run, f"the push is for run {e.run}, not for this one.")
    require(e.layout == wanted.layout, "the push is of another model (its parameters lie elsewhere).")
    require(e.incarnation == lease.incarnation, "the push is of another process of that name.")
    require(e.fragment == lease.fragment, f"the push has fragment {e.fragment}, the lease is for {lease.fragment}.")
    require(e.codec == wanted.codec, f"the push has codec {e.codec!r}, the run has {wanted.codec!r}.")
    plausible = 0 < e.tokens <= wanted.max_tokens
    require(plausible, f"the push counts {e.tokens} tokens, 1 to {wanted.max_tokens} are possible.")
    age = wanted.versions[e.fragment] - e.version
    require(age >= 0, f"the push started from version {e.version}, which does not exist yet.")
    if age > wanted.max_age:
        raise StaleError(f"the push is {age} merges old, at most {wanted.max_age} are taken.")
    gradient = codec(e.codec).decode(unpack(pushed.data, "the push"), wanted.sizes[e.fragment])
    require(is_finite(gradient), "the push holds numbers that are not finite.")
    return gradient


def size_limit(codec_name: str, size: int) -> int:
    """The bytes of a coded vector of `size` entries, with room for the header of the file."""
    encoded = codec(codec_name).encode(torch.zeros(size))
    return len(pack(encoded)) + 1024


def _checked(data: bytes, key: bytes | None, name: str) -> dict[str, Any]:
    record = from_bytes(data, name)
    check_signature(record, key, name)
    return {field: value for field, value in record.items() if field != SIGNATURE}
