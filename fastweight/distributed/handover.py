"""A state on its way from one process to the next, and its gradient on the way back.

A hand-over is two messages: a header on the host (which tensors, of which shapes and dtypes), then all numbers in one.
Its gradient is one message in the other direction, of the floating-point tensors alone.

The order. The pieces 0, 1, … of a sequence are dealt to the processes in turn: of R processes, process r reads the
pieces r, r + R, …, one after the other. For each part of the model that has a state, in the order in which the model
visits them, piece p receives from piece p - 1, computes, and sends to p + 1. Sending waits for nobody; receiving waits
for one message, that of the piece before at the same place; piece 0 receives nothing. So the earliest piece that is not
finished can always go on and nobody waits in a circle, and a process may be any number of layers ahead of the one after
it. In the backward pass the same holds from the last piece on: the gradient of the last hand-over is the first to be
sent. Between two neighbours all messages of a forward pass go in one direction and those of the backward pass in the
other; so that this is true, two processes have one piece each (where a device takes messages in order, two that send to
each other at once would wait for ever).

What the layers read (x) passes through `send_state` and `receive_state`: autograd runs every one of them, and in the
reverse of the forward order, on all processes alike.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastweight.configs import require
from fastweight.state import rebuild, structure, tensors

HEADER_BYTES = 16384


class Spec(NamedTuple):
    """What a header says about a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class Posted(NamedTuple):
    """A message that is being sent."""

    work: Any
    message: Tensor


class Line:
    """Messages between this process and its neighbours in the order of the text, by their ranks among all processes.

    Messages from one process arrive in the order in which they were sent.
    """

    def __init__(self, before: int, after: int):
        self.before, self.after = before, after
        self._underway: list[Posted] = []

    def post(self, message: Tensor, to: int) -> Posted:
        """Send without waiting; `message` must not change until it has arrived."""
        self._underway.append(Posted(dist.isend(message, to), message))
        return self._underway[-1]

    def fetch(self, buffer: Tensor, source: int) -> Tensor:
        """Fill `buffer` with the next message from `source`."""
        dist.recv(buffer, source)
        return buffer

    def settle(self, posted: Sequence[Posted] | None = None) -> None:
        """Wait until these messages (None: all) have arrived, and let go of them."""
        done = list(self._underway if posted is None else posted)
        for one in done:
            one.work.wait()
        self._underway = [one for one in self._underway if not any(one is other for other in done)]


def send_state(line: Line, x: Tensor, state: Any) -> Tensor:
    """Hand the tree `state` to the process after; in the backward pass its gradient comes from there. Returns x."""
    named = dict(tensors(state))
    about = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in named.items()}
    header = json.dumps({"structure": structure(state), "tensors": about}).encode()
    require(
        len(header) <= HEADER_BYTES,
        f"context: the description of a state takes {len(header)} bytes, a header has {HEADER_BYTES}.",
    )
    posted = line.post(torch.frombuffer(bytearray(header.ljust(HEADER_BYTES)), dtype=torch.uint8), line.after)
    return _Send.apply(line, posted, _anchor(x), x, *named.values())  # type: ignore[no-any-return]  # untyped


def receive_state(line: Line, x: Tensor) -> tuple[Tensor, Any]:
    """x, and what the process before hands over; in the backward pass its gradient goes there."""
    header = line.fetch(torch.empty(HEADER_BYTES, dtype=torch.uint8), line.before)
    about = json.loads(bytes(header.tolist()))
    specs = [Spec(getattr(torch, dtype), torch.Size(shape)) for dtype, shape in about["tensors"].values()]
    x, *found = _Receive.apply(line, specs, _anchor(x), x)
    return x, rebuild(about["structure"], dict(zip(about["tensors"], found, strict=True)))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Line, header: Posted, anchor: Tensor, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.line, ctx.specs = line, [Spec(t.dtype, t.shape) for t in parts]
        ctx.posted = [header, line.post(pack(parts), line.after)]
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        line, floats = ctx.line, [spec for spec in ctx.specs if spec.dtype.is_floating_point]
        buffer = torch.empty(sum(spec.num_bytes for spec in floats), dtype=torch.uint8, device=grad.device)
        grads = iter(unpack(line.fetch(buffer, line.after), floats))
        line.settle(ctx.posted)  # who sends their gradient has received them
        return None, None, None, grad, *(next(grads) if s.dtype.is_floating_point else None for s in ctx.specs)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, line: Line, specs: list[Spec], anchor: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        ctx.line, ctx.specs = line, specs
        buffer = torch.empty(sum(spec.num_bytes for spec in specs), dtype=torch.uint8, device=x.device)
        parts = unpack(line.fetch(buffer, line.before), specs)
        ctx.mark_non_differentiable(*(t for t in parts if not t.is_floating_point()))
        return x.view_as(x), *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        floats = [g.to(spec.dtype) for g, spec in zip(grads, ctx.specs, strict=True) if spec.dtype.is_floating_point]
        ctx.line.post(pack(floats), ctx.line.before)
        return None, None, None, grad


def pack(parts: Sequence[Tensor]) -> Tensor:
    """The numbers of all tensors in one run of bytes: widest dtypes first, so that each is aligned."""
    order = sorted(range(len(parts)), key=lambda i: -parts[i].element_size())
    return torch.cat([parts[i].detach().contiguous().view(-1).view(torch.uint8) for i in order])


def unpack(message: Tensor, specs: Sequence[Spec]) -> list[Tensor]:
    """The tensors that `pack` has put together, as copies: each may be let go of by itself."""
    order = sorted(range(len(specs)), key=lambda i: -specs[i].dtype.itemsize)
    pieces = message.split([specs[i].num_bytes for i in order])
    found = {i: piece.view(specs[i].dtype).view(specs[i].shape).clone() for i, piece in zip(order, pieces, strict=True)}
    return [found[i] for i in range(len(specs))]


def _anchor(x: Tensor) -> Tensor:
    """Something that asks for a gradient: both ends of a hand-over take part in the backward pass, or neither does,
    whatever of x and the state is trained."""
    return torch.zeros((), device=x.device, requires_grad=torch.is_grad_enabled())
