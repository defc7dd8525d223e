"""Weights as values: what a model is run with, while its own parameters stay as they are."""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastweight.configs import require
from fastweight.model import Model

T = TypeVar("T")


@dataclass(frozen=True)
class Weights(ABC):
    """tensors: what the model is run with, by name. memory: what the learner alone keeps (momenta, counts)."""

    tensors: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)

    @abstractmethod
    def run(self, model: Model, lengths: Sequence[int], do: Callable[[Model], T]) -> T:
        """`do(model)` with these weights. lengths: tokens of each sequence that `do` reads."""

    def traced(self) -> "Weights":
        """The same values as leaves of a new autograd graph."""
        return replace(self, tensors={name: t.detach().requires_grad_() for name, t in self.tensors.items()})

    def digest(self) -> str:
        """SHA-256 of everything held: equal exactly where the weights are."""
        digest = hashlib.sha256()
        for name, tensor in [*sorted(self.tensors.items()), *sorted(self.memory.items())]:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SharedWeights(Weights):
    """Parameters instead of the model's own, by their names in the model; one set for all sequences."""

    def run(self, model: Model, lengths: Sequence[int], do: Callable[[Model], T]) -> T:
        return run_with(model, self.tensors, do)


@dataclass(frozen=True)
class RowWeights(Weights):
    """What is added to linear layers, for each sequence its own: y = W x + scale · F_n … F_1 F_0 x.

    layers: for each layer, by its name in the model, the names of its factors F_0, F_1 … in `tensors`, each
    [N, out, in]. Everything in `memory` has N rows too.
    """

    layers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scale: float = 1.0

    def run(self, model: Model, lengths: Sequence[int], do: Callable[[Model], T]) -> T:
        reached: set[str] = set()
        with self._attached(model, lengths, reached):
            result = run_with(model, {}, do)
        missed = [layer for layer in self.layers if layer not in reached]
        require(not missed, f"learn: the model reads {', '.join(missed[:4])} without calling it. Leave it out.")
        return result

    @property
    def num_sequences(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def select(self, rows: Sequence[int]) -> "RowWeights":
        """The sequences `rows`, in that order."""
        return self._each(lambda t: t[list(rows)])

    def extend(self, other: "RowWeights") -> "RowWeights":
        """These sequences, followed by those of `other`."""
        join = lambda a, b: {name: torch.cat([t, b[name]]) for name, t in a.items()}  # noqa: E731
        return replace(self, tensors=join(self.tensors, other.tensors), memory=join(self.memory, other.memory))

    def repeat(self, num_sequences: int) -> "RowWeights":
        """`num_sequences` copies of the first sequence."""
        return self.select([0] * num_sequences)

    def _each(self, fn: Callable[[Tensor], Tensor]) -> "RowWeights":
        each = lambda tree: {name: fn(tensor) for name, tensor in tree.items()}  # noqa: E731
        return replace(self, tensors=each(self.tensors), memory=each(self.memory))

    @contextlib.contextmanager
    def _attached(self, model: Model, lengths: Sequence[int], reached: set[str]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer, names in self.layers.items():
                hook = self._hook(layer, [self.tensors[name] for name in names], list(lengths), reached)
                stack.callback(model.get_submodule(layer).register_forward_hook(hook).remove)
            yield

    def _hook(
        self, layer: str, factors: list[Tensor], lengths: list[int], reached: set[str]
    ) -> Callable[..., Tensor]:  # fmt: skip
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            reached.add(layer)
            require(
                x.shape[:-1].numel() == sum(lengths),
                f"learn: {layer} reads {list(x.shape)} for {sum(lengths)} tokens; weights per sequence need one row "
                "per token. Leave it out.",
            )
            wide = torch.promote_types(output.dtype, factors[0].dtype)
            added = _per_sequence(x.to(wide), lengths, factors)
            return (output.to(wide) + self.scale * added).to(output.dtype)

        return add


def run_with(model: Model, parameters: dict[str, Tensor], do: Callable[[Model], T]) -> T:
    """`do(model)` with `parameters` by name; the others as they are, and cut from autograd. The model is unchanged."""
    held = {name: p.detach() for name, p in model.named_parameters()} | parameters
    named = {f"model.{name}": tensor for name, tensor in held.items()}
    return torch.func.functional_call(_Call(model), named, (do,))


class _Call(nn.Module):
    """`functional_call` swaps the parameters of a module for the time of its `forward`."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(self, do: Callable[[Model], T]) -> T:
        return do(self.model)


def _per_sequence(x: Tensor, lengths: list[int], factors: list[Tensor]) -> Tensor:
    """x [.., in] times each sequence's factors [N, out, in]; its tokens stand one sequence after the other."""
    flat = x.reshape(-1, x.shape[-1])
    equal = len(set(lengths)) == 1
    y = flat.view(len(lengths), -1, x.shape[-1]) if equal else pad_sequence(list(flat.split(lengths)), batch_first=True)
    for factor in factors:
        y = torch.bmm(y, factor.mT)
    y = y.flatten(0, 1) if equal else torch.cat([row[:n] for row, n in zip(y, lengths, strict=True)])
    return y.view(*x.shape[:-1], -1)
