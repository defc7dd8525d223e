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
class Slice:
    """What a process reads of a batch.

    batch: a part of every row, or of the packed row. position: [N], tokens of each of its sequences that stand before
    it. receives, sends: whether its first sequence (of rows: all of them) has begun before it, and goes on after it.
    """

    batch: Batch
    position: Tensor
    receives: bool = False
    sends: bool = False


class Context:
    """The processes among which sequences are cut: this one reads part number `part` of `parts`. Alone (`Context()`),
    it reads all of them.

    group: the processes, in the order of the text. Methods that exchange something must be called by all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.parts = len(ranks)
        self.part = 0 if group is None else dist.get_rank(group)
        before, after = ([None, *ranks, None][self.part + step] for step in (0, 2))
        self.line = Line(before, after)

    def check_length(self, length: int) -> None:
        """Refuse rows of so few tokens that a process would have none."""
        require(
            length >= self.parts,
            f"context: a row of {length} tokens cannot be cut for {self.parts} processes. Read longer rows "
            "(data.seq_len), or lower mesh.context.",
        )

    def cut(self, batch: Batch) -> Slice:
        """This process's part of `batch`, which all have. Raises ValueError if there are too few tokens for all."""
        length = batch.tokens.shape[1]
        self.check_length(length)
        start, stop = (length * part // self.parts for part in (self.part, self.part + 1))
        tokens, targets, sizes = (z[:, start:stop] for z in (batch.tokens, batch.targets, batch.target_bytes))
        parts = {"tokens": tokens, "targets": targets, "target_bytes": sizes}
        if batch.cu_seqlens is None:
            position = torch.full((len(tokens),), start)
            return Slice(batch=Batch(**parts), position=position, receives=start > 0, sends=stop < length)
        inside = batch.cu_seqlens[(batch.cu_seqlens > start) & (batch.cu_seqlens < stop)]
        ends = torch.cat([inside.new_tensor([start]), inside, inside.new_tensor([stop])])
        begun = int(batch.cu_seqlens[batch.cu_seqlens <= start].max())
        position = torch.zeros(len(ends) - 1, dtype=torch.int64)
        position[0] = start - begun
        sends = not bool((batch.cu_seqlens == stop).any())
        return Slice(
            batch=Batch(**parts, cu_seqlens=ends - start), position=position, receives=start > begun, sends=sends
        )

    @contextlib.contextmanager
    def reading(self, model: Model, part: Slice) -> Iterator[None]:
        """Inside, `model` reads `part.batch` as a part of the whole, forward and backward.

        A forward pass starts from new states (None). All processes must make the same passes, in the same order.
        """
        if self.parts == 1:
            yield
            return
        model.relay = _Relay(self.line, part)
        try:
            yield
        finally:
            model.relay = None
        self.line.settle()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all parts, in place. One that no part has stays away."""
        if self.parts == 1:
            return
        parameters = list(parameters)
        found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
        dist.all_reduce(found, group=self.group)
        works = []
        for p in (p for p, number in zip(parameters, found.tolist(), strict=True) if number):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            own = local(p.grad)
            works += [dist.all_reduce(own, group=self.group, async_op=True)] if own.numel() else []
        for work in works:
            work.wait()


class _Relay:
    """The hand-overs of one slice."""

    def __init__(self, line: Line, part: Slice):
        self.line, self.part = line, part
        self.packed = part.batch.cu_seqlens is not None
        self.num_sequences = len(part.position)
        lengths = part.batch.tokens.shape[1] if part.batch.cu_seqlens is None else part.batch.cu_seqlens.diff()
        self.read = int((part.position + lengths)[-1])  # tokens of the sequences that go on, up to the cut

    def begin(self, state: ModelState) -> ModelState:
        position = self.part.position.to(state.position.device)
        return ModelState(state.visits, position, state.signature, state.note, state.last)

    def receive(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.part.receives:
            return x, state
        x, carried = receive_state(self.line, x)
        keep = torch.ones(self.num_sequences, dtype=torch.bool, device=x.device)
        if self.packed:
            carried = map_tensors(lambda t: t.expand(self.num_sequences, *t.shape[1:]), carried)
            keep[1:] = False
        if isinstance(state, Start):
            return x, Start(state.count, carried, keep)
        fresh, old = (ModelState((tree,), self.part.position, "") for tree in (state, carried))
        return x, old.where(keep, fresh).visits[0]

    def send(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if not self.part.sends:
            return x, state
        handed = map_tensors(lambda t: t[-1:], state) if self.packed else state
        return send_state(self.line, x, _travelling(handed, self.read)), state


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
