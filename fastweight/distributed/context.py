"""Sequences longer than one process holds: cut along T, each process reads its part from the state of the one before.

Nothing here knows a layer: a state holds all that the next token needs, so that any cut of a sequence is exact.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastweight.configs import require
from fastweight.data import Batch
from fastweight.distributed.handover import Line, receive_state, send_state
from fastweight.distributed.shards import Start
from fastweight.model import Model
from fastweight.ops.attention import AttentionState
from fastweight.optim.cut import local
from fastweight.state import Faults, ModelState, map_tensors


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens start … stop - 1 of what a process holds of a row: a piece of the text without gaps.

    position: [N], tokens of each of its sequences that stand before it. cu_seqlens: [N+1] of a packed row, from 0.
    receives, sends: whether its first sequence has begun before it, and whether its last one goes on after it; of
    rows, all of them.
    """

    start: int
    stop: int
    position: Tensor
    cu_seqlens: Tensor | None
    receives: bool
    sends: bool


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What a process reads of a batch: its pieces of every row, or of the packed row, one after another in `batch`."""

    batch: Batch
    pieces: tuple[Piece, ...] = ()


class Context:
    """The processes among which sequences are cut: this one is number `part` of `parts`. Alone (`Context()`), it reads
    all of them.

    group: the processes, in the order of the text. turns: how often the text goes round them; a row is cut into
    turns · parts pieces, of which each process reads every parts-th. Methods that exchange something must be called by
    all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, turns: int = 1):
        self.group, self.turns = group, turns
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.parts = len(ranks)
        self.part = 0 if group is None else dist.get_rank(group)
        self.line = Line(ranks[self.part - 1], ranks[(self.part + 1) % self.parts])

    def check_length(self, length: int) -> None:
        """Refuse rows of so few tokens that a piece would have none."""
        require(
            length >= self.parts * self.turns,
            f"context: a row of {length} tokens cannot be cut into {self.parts * self.turns} pieces for {self.parts} "
            "processes. Read longer rows (data.seq_len), or lower mesh.context or mesh.turns.",
        )

    def cut(self, batch: Batch) -> Slice:
        """This process's part of `batch`, which all have. Raises ValueError if there are too few tokens for all."""
        if self.parts == 1:
            return Slice(batch=batch)
        length, count = batch.tokens.shape[1], self.parts * self.turns
        self.check_length(length)
        bounds = [length * i // count for i in range(count + 1)]
        own = [(bounds[i], bounds[i + 1]) for i in range(self.part, count, self.parts)]
        pieces, done = [], 0
        for start, stop in own:
            pieces.append(_piece(batch, start, stop, done))
            done += stop - start
        named = {name: getattr(batch, name) for name in ("tokens", "targets", "target_bytes", "weights")}
        joined = {
            name: torch.cat([z[:, start:stop] for start, stop in own], 1) for name, z in named.items() if z is not None
        }
        ends = [piece.cu_seqlens + piece.start for piece in pieces if piece.cu_seqlens is not None]
        packed = torch.cat([ends[0][:1], *(end[1:] for end in ends)]) if ends else None
        return Slice(batch=Batch(**joined, cu_seqlens=packed), pieces=tuple(pieces))

    @contextlib.contextmanager
    def reading(self, model: Model, part: Slice) -> Iterator[list[ModelState]]:
        """Inside, `model` reads `part.batch` as a part of the whole, forward and backward.

        Yields the states after each piece, detached, as they come; `model` itself returns the last one. A forward pass
        starts from new states (None). All processes must make the same passes, in the same order.
        """
        if self.parts == 1:
            yield []
            return
        relay = _Relay(self.line, part)
        model.relay = relay
        try:
            yield relay.states
        finally:
            model.relay = None
        self.line.settle()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all parts, in place. One that no part has stays away."""
        if self.parts == 1:
            return
        parameters = list(parameters)
        found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(found, group=self.group)
        works = []
        for p in (p for p, number in zip(parameters, found.tolist(), strict=True) if number):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            own = local(p.grad)
            works += [dist.all_reduce(own, group=self.group, async_op=True)] if own.numel() else []
        for work in works:
            work.wait()


def _piece(batch: Batch, start: int, stop: int, done: int) -> Piece:
    """Tokens start … stop - 1 of the rows of `batch`, of which this process holds `done` tokens before."""
    place = {"start": done, "stop": done + stop - start}
    if batch.cu_seqlens is None:
        position = torch.full((len(batch.tokens),), start)
        more = stop < batch.tokens.shape[1]
        return Piece(**place, position=position, cu_seqlens=None, receives=start > 0, sends=more)
    ends = batch.cu_seqlens
    inside = ends[(ends > start) & (ends < stop)]
    own = torch.cat([ends.new_tensor([start]), inside, ends.new_tensor([stop])]) - start
    position = torch.zeros(len(own) - 1, dtype=torch.int64)
    position[0] = start - int(ends[ends <= start].max())
    sends = not bool((ends == stop).any())
    return Piece(**place, position=position, cu_seqlens=own, receives=bool(position[0] > 0), sends=sends)


class _Relay:
    """The hand-overs of one slice. states: those after its pieces."""

    def __init__(self, line: Line, part: Slice):
        self.line, self.pieces = line, part.pieces
        self.piece = part.pieces[0]
        self.states: list[ModelState] = []

    def read(self, model: Any, tokens: Tensor, state: ModelState | None) -> tuple[Tensor, ModelState]:
        require(state is None, "context: a sequence that is cut over processes starts anew; pass no state.")
        outputs, states = [], []
        for piece in self.pieces:
            self.piece = piece
            start = model.init_state(len(piece.position))
            start.position = piece.position.to(start.position.device)
            x, after = model.read(tokens[:, piece.start : piece.stop], start, piece.cu_seqlens)
            outputs.append(x)
            states.append(after)
        self.states[:] = [after.detach() for after in states]
        return torch.cat(outputs, 1), states[-1]

    def receive(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.piece.receives:
            return x, state
        x, carried = receive_state(self.line, x)
        if self.piece.cu_seqlens is None:
            return x, carried
        count = len(self.piece.position)
        carried = map_tensors(lambda t: t.expand(count, *t.shape[1:]), carried)
        keep = torch.arange(count, device=x.device) == 0
        if isinstance(state, Start):
            return x, Start(count, carried, keep)
        fresh, old = (ModelState((tree,), self.piece.position, "") for tree in (state, carried))
        return x, old.where(keep, fresh).visits[0]

    def send(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.piece.sends:
            return x, state
        piece, handed = self.piece, state
        length = piece.stop - piece.start
        if piece.cu_seqlens is not None:
            handed, length = map_tensors(lambda t: t[-1:], state), int(piece.cu_seqlens.diff()[-1])
        return send_state(self.line, x, _travelling(handed, int(piece.position[-1]) + length)), state


def _travelling(tree: Any, read: int) -> Any:
    """What of a state goes on: no slots of a cache before its first token, and no faults, which each process counts.

    read: tokens that its sequences have read.
    """
    if isinstance(tree, Faults):
        return Faults.none(len(tree.first), tree.first.device)
    if isinstance(tree, AttentionState):
        slots = min(tree.k.shape[1], read)
        k, v = (t[:, t.shape[1] - slots :] for t in (tree.k, tree.v))
        return tree._replace(k=k, v=v)
    if not isinstance(tree, tuple):
        return tree
    children = [_travelling(child, read) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
