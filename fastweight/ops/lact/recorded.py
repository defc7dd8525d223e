"""Both passes of a LaCT call as CUDA graphs, for calls of one size that come again.

A call is about a thousand small launches, one after the other; the device does each in microseconds, the host takes
tens of them. Recorded once and replayed, only the copies in and out are launched. The numbers are the same to the bit.
What is recorded works on tensors of its own (a desk), so a desk serves one call at a time, whichever layer it is of;
what the backward pass needs is copied away, and back unless no other call came in between, as where a block is computed
again just before its backward pass. The host looks at nothing here: whole batches only.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastweight.ops.lact import backward, forward
from fastweight.ops.lact.backward import Gradients
from fastweight.ops.lact.grid import Memory, Tokens, Trail, learnable, make_grid
from fastweight.state import map_tensors

if TYPE_CHECKING:
    from fastweight.ops.lact.unit import Settings

ENABLED = True
MOST_DESKS = 4  # sizes of calls in use; the one that was not needed for longest goes
FIRST_RUNS = 1  # of a size, not recorded: libraries choose their kernels, and kernels are compiled
_desks: "OrderedDict[tuple, Desk | int]" = OrderedDict()


def find(tokens: Tokens, memory: Memory, settings: "Settings", *, again: bool = False) -> "Desk | None":
    """The desk for calls of this size on this stream, or None: the call is to run as usual.

    again: the call's backward pass, which counts as the same call and makes no desk.
    """
    if not (ENABLED and settings.fused and tokens.q.is_cuda) or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream(tokens.q.device).cuda_stream
    shapes = tuple((t.shape, t.dtype) for t in (*tokens[:4], memory.weights, memory.norms))
    key = (tokens.q.device, stream, shapes, tokens.beta is None, str(settings._replace(save=True)))
    found = _desks.get(key, 0)
    if again and not isinstance(found, Desk):
        return None
    if isinstance(found, int):
        late = found >= FIRST_RUNS
        with torch.inference_mode(False):  # a desk serves training and inference, whichever comes first
            _desks[key] = Desk(tokens, memory, settings._replace(save=True)) if late else found + 1
    _desks.move_to_end(key)
    while len(_desks) > MOST_DESKS:
        _desks.popitem(last=False)
    found = _desks[key]
    return found if isinstance(found, Desk) else None


def forget() -> None:
    """Give the memory of all desks back."""
    _desks.clear()


class Desk:
    """Tensors of one size, and the passes that are recorded on them."""

    def __init__(self, tokens: Tokens, memory: Memory, settings: "Settings"):
        self._settings, self._pieces = settings, settings.pieces()
        self._dtype, self._rule = settings.dtype(tokens, memory), settings.rule(tokens.q.shape[1])
        self._rows = settings.rows(len(tokens.q), len(memory.norms))
        self._grid = make_grid(tokens, tokens.due.clone(), self._dtype, self._pieces)
        self._memory = map_tensors(torch.clone, memory)
        self._y = torch.empty_like(self._grid.q)
        self._trail = forward.empty_trail(self._grid.q, memory, self._rule, save=True)
        self._good = torch.empty_like(tokens.due)
        self._forward: Any = None
        self._backward: Any = None
        self._warm = False
        self._call: StorageWeakRef | None = None  # whose tokens and trail lie here: that of the trail it was given

    def forward(self, tokens: Tokens, memory: Memory, *, save: bool) -> tuple[Tensor, Memory, Tensor, Trail]:
        """As `unit.forward_pass`; the trail is empty unless it is to be saved."""
        self._call = None  # until all of this call lies here
        good = learnable(tokens, self._pieces, out=self._grid.due)
        make_grid(tokens, good, self._dtype, self._pieces, into=self._grid)
        _fill(self._memory, memory)
        if self._forward is None:
            run = partial(forward.run, save=True)
            with torch.inference_mode(False):
                self._forward = _Replay(
                    run, self._grid, self._memory, self._rule, self._rows, self._pieces, trail=self._trail
                )
        y, end, good, trail = self._forward()
        kept = trail if save else [t[:0] for t in trail]
        weights, momentum, accumulator, good, *kept = _copies(end.weights, *end[2:], good, *kept)
        self._call = StorageWeakRef(kept[0].untyped_storage())
        return self._pieces.swap(y, y.dtype), Memory(weights, memory.norms, momentum, accumulator), good, Trail(*kept)

    def backward(self, tokens: Tokens, trail: Trail, good: Tensor, y: Tensor, end: Memory) -> Gradients:
        """As `unit.backward_pass`. The first is not recorded: a kernel that is loaded meanwhile spoils a recording."""
        from fastweight.ops.lact.unit import as_given, backward_pass

        if not self._warm:
            self._warm = True
            return backward_pass(tokens, trail, good, y, end, settings=self._settings)
        self._pieces.swap(y, self._dtype, out=self._y)
        _fill((self._good, *self._memory), (good, *end))
        if not self._is_last(trail):
            make_grid(tokens, good, self._dtype, self._pieces, into=self._grid)
            _fill(self._trail, trail)
        self._call = None
        self._backward = self._backward or _Replay(
            backward.run, self._grid, self._trail, self._memory.norms, self._good, self._y, self._memory, self._rule,
            self._rows, self._pieces,
        )  # fmt: skip
        found = self._backward()
        found = as_given(found, tokens.q.shape[1], self._pieces)
        return found._replace(memory=Memory(*_copies(*found.memory)))

    def _is_last(self, trail: Trail) -> bool:
        """Whether this trail is of the last forward call, whose tokens and trail still lie here. Then tokens of an
        update that did not happen are not zero; `backward` masks what it makes of them."""
        return self._call is not None and self._call == StorageWeakRef(trail.weights.untyped_storage())


def _fill(own: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """own ← given in one call, a copy each: kernels that copy several tensors at once are slower at these sizes."""
    there = [(a, b) for a, b in zip(own, given, strict=True) if a is not None and b is not None]
    torch._foreach_copy_([a for a, _ in there], [b for _, b in there])  # pyright: ignore[reportPrivateImportUsage]


def _copies(*tensors: Tensor | None) -> list[Any]:
    """A copy of each; None of None."""
    copies = [None if t is None else torch.empty_like(t) for t in tensors]
    _fill(copies, tensors)
    return copies


class _Replay:
    """`run` on these tensors, recorded at the first call; each call returns the same tensors with new numbers."""

    def __init__(self, run: Callable[..., Any], *arguments: Any, **named: Any):
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device while this one records.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._results = run(*arguments, **named)

    def __call__(self) -> Any:
        self._graph.replay()
        return self._results
