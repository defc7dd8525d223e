"""Decoding token by token: on a GPU the step is recorded once as a CUDA graph and replayed.

A step of a model with constant state is hundreds of small kernels with always the same shapes; launched one by one,
the host is what takes the time. Recorded, the state lives in fixed tensors that each step overwrites. Steps in which a
memory does more than usual (a chunk ends) are run as usual.
"""

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.model import Model
from fastweight.ops.sequences import in_place
from fastweight.state import ModelState, tensors

WARM_UP_STEPS = 3  # before recording, so that libraries have chosen their kernels


class Stepper:
    """`logits = stepper(tokens)` reads one token per sequence; `stepper.state` is what it has read so far.

    static: keep the state in place, and on a GPU replay a recorded step. On a CPU a static state changes nothing but
    where the numbers lie. A recording holds memory of its own.
    Raises ValueError if static is asked for and the state grows with the text (a layer attends to all of the past).
    """

    def __init__(self, model: Model, state: ModelState, *, static: bool = False):
        self.model = model
        settled = model.settled(state) if static else None
        if static and settled is None:
            raise ValueError(
                "Stepper: static needs a state of constant size, this model attends to all of its past. "
                "Give its attention a window, or leave static out."
            )
        self._static = settled is not None
        with torch.inference_mode():  # as steps read it: compiled blocks tell tensors by that, too
            self._state = state if settled is None else settled.fork()
        self._tokens = torch.zeros(state.num_sequences, 1, dtype=torch.int64, device=model.device)
        self._positions = state.position.tolist() if self._static else []
        self._memories = [model.blocks[i].memories() for i in model.visits]  # type: ignore[operator]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._static and self._tokens.is_cuda

    @property
    def state(self) -> ModelState:
        """The state after the tokens read so far, to keep or to fork: later steps leave it as it is."""
        return self._state.fork() if self._static else self._state

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [N, 1, vocab_size] after tokens [N, 1]; where steps are replayed they are overwritten by the next."""
        if not self._static:
            logits, self._state = self.model(tokens, self._state)
            return logits
        require(
            tokens.shape == self._tokens.shape and not tokens.is_floating_point(),
            f"Stepper: needs integers {list(self._tokens.shape)}, got {tokens.dtype} {list(tokens.shape)}.",
        )
        self._tokens.copy_(tokens)
        if self.recorded and not self._acts():
            self._graph = self._graph or self._record()
            self._graph.replay()
            assert self._logits is not None
            logits = self._logits
        else:
            logits = self._step(self._copied())
        self._positions = [position + 1 for position in self._positions]
        return logits

    def _acts(self) -> bool:
        return any(m.acts_at(p) for visit in self._memories for m in visit for p in set(self._positions))

    def _step(self, state: ModelState) -> Tensor:
        logits, after = self.model(self._tokens, state)
        _overwrite(self._state, after)
        return logits

    def _copied(self) -> ModelState:
        """What a step that is not recorded reads: ops may note on a GPU's tensors what they hold, and ours change."""
        return self._state.fork() if self._tokens.is_cuda else self._state

    def _record(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; the state stays as it is."""
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream), in_place():
            for _ in range(WARM_UP_STEPS):
                self.model(self._tokens, self._copied())
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), in_place():
            self._logits = self._step(self._state)
        return graph


def fast_stepper(model: Model, state: ModelState) -> Stepper:
    """For many steps: recorded on a GPU where the state has a constant size, plain elsewhere."""
    return Stepper(model, state, static=model.device.type == "cuda" and model.settled(state) is not None)


def _overwrite(old: ModelState, new: ModelState) -> None:
    """Copy the numbers of `new` into the tensors of `old`."""
    parts = list(zip(_parts(old), _parts(new), strict=True))
    grown = [name for (name, a), (_, b) in parts if a.shape != b.shape]
    if grown:
        raise ValueError(f"Stepper: {', '.join(grown)} of the state changed in size within a step, it must not.")
    pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for (_, a), (_, b) in parts:
        if a is not b:
            pairs.setdefault(a.dtype, []).append((a, b))
    for some in pairs.values():  # tensors of one dtype are copied by few kernels
        torch._foreach_copy_([a for a, _ in some], [b for _, b in some])  # pyright: ignore[reportPrivateImportUsage]


def _parts(state: ModelState) -> list[tuple[str, Tensor]]:
    return list(tensors((state.visits, state.position, state.last)))
