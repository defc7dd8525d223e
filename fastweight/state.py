"""A state is a value: a tree of NamedTuples of tensors whose first dimension is the sequence.

It can be sized, forked, selected, detached, moved, saved and loaded; nothing in the library mutates one.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fastweight.tensor_files import read_tensors, write_tensors

FORMAT = "fastweight-state"
VERSION = 1

T = TypeVar("T")
_TYPES: dict[str, type] = {}


def register_state(cls: type[T]) -> type[T]:
    """Class decorator for a state's NamedTuple: makes it loadable by its name."""
    if _TYPES.setdefault(cls.__name__, cls) is not cls and _TYPES[cls.__name__].__module__ != cls.__module__:
        raise ValueError(
            f"state type {cls.__name__!r} exists already, in {_TYPES[cls.__name__].__module__}. Rename it."
        )
    _TYPES[cls.__name__] = cls
    return cls


@register_state
class Faults(NamedTuple):
    """Inner updates that were not finite and therefore not applied.

    count: [N] int64, how many. first: [N] int64, position of the first one in its sequence, -1 for none.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count is not missed
    first: Tensor

    @staticmethod
    def none(num_sequences: int, device: torch.device | str | None = None) -> "Faults":
        count = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        return Faults(count, torch.full_like(count, -1))

    def add(self, count: Tensor, first: Tensor) -> "Faults":
        """Add `count` [N] new faults, the first of them at position `first` [N] (ignored where count is 0)."""
        is_first = (self.first < 0) & (count > 0)
        return Faults(self.count + count, torch.where(is_first, first, self.first))


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `fn` to every tensor of a state tree; None stays None."""
    return zip_tensors(fn, tree)


def zip_tensors(fn: Callable[..., Tensor], *trees: Any) -> Any:
    """Apply `fn` to the tensors that stand at the same place of several state trees."""
    first = trees[0]
    if any(tree is None for tree in trees):
        if any(tree is not None for tree in trees):
            raise ValueError(
                "these states do not hold the same parts: one lacks a cache or a memory that another has, as when the "
                "weight of a memory was 0 or 1 for one of them alone. Make both under the same settings."
            )
        return None
    if isinstance(first, Tensor):
        return fn(*trees)
    children = [zip_tensors(fn, *group) for group in zip(*trees, strict=True)]
    return type(first)(*children) if hasattr(first, "_fields") else tuple(children)


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted name, tensor) for every tensor of a state tree."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        names = getattr(tree, "_fields", None) or [str(i) for i in range(len(tree))]
        for field, child in zip(names, tree, strict=True):
            yield from tensors(child, f"{name}.{field}" if name else field)


class Relay(Protocol):
    """What carries the states of sequences that other processes have begun to read, and will read on.

    A model that has one lets it `read`, and asks it before and after everything that has a state; x: what that reads.
    """

    def read(self, model: Any, tokens: Tensor, state: "ModelState | None") -> "tuple[Tensor, ModelState]":
        """What `model.features` gives for this process's parts of the sequences, [B, T], and a state after them."""
        ...

    def receive(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x, and the part of a state to go on from where the process before has read a sequence so far."""
        ...

    def send(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x and `state`, of which the process after has got what it needs."""
        ...


class ModelState:
    """Everything a model needs to read the next token: one entry per visited block.

    visits: tuple of block states, in the model's `order`. position: [N] int64, tokens read by each sequence.
    signature: names the model config; a state of another model is refused. note: free text kept with a saved state.
    last: [N, 1, D], the embedding of the last token (zeros before the first), for a model with a smear gate, else None.
    """

    def __init__(
        self,
        visits: tuple,
        position: Tensor,
        signature: str,
        note: dict[str, str] | None = None,
        last: Tensor | None = None,
    ):
        self.visits = visits
        self.position = position
        self.signature = signature
        self.note = dict(note or {})
        self.last = last

    def __repr__(self) -> str:
        return (
            f"ModelState(sequences={self.num_sequences}, position={self.position.tolist()}, "
            f"visits={len(self.visits)}, num_bytes={self.num_bytes})"
        )

    @property
    def num_sequences(self) -> int:
        return self.position.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(t.numel() * t.element_size() for _, t in tensors(self._tree()))

    def fork(self) -> "ModelState":
        """An independent copy: continuing one leaves the other as it is."""
        return self._map(torch.clone)

    def select(self, indices: Sequence[int] | Tensor) -> "ModelState":
        """The sequences `indices`, in that order; an index may repeat, which makes copies."""
        rows = _rows(torch.as_tensor(indices), self.num_sequences).to(self.position.device)
        return self._map(lambda t: t.index_select(0, rows))

    def detach(self) -> "ModelState":
        """The same values, cut from the autograd graph (truncated backpropagation through time)."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> "ModelState":
        """The state on `device`."""
        return self._map(lambda t: t.to(device))

    def where(self, keep: Tensor, other: "ModelState") -> "ModelState":
        """Rows of self where `keep` [N] is true, rows of `other` elsewhere (used to restart finished sequences), in the
        dtypes of self: what is made outside autocast may be wider."""
        if other.signature != self.signature:
            raise ValueError(f"where: the other state is of another model ({other.signature}, not {self.signature}).")
        if other.num_sequences != self.num_sequences or keep.dtype != torch.bool or keep.shape != self.position.shape:
            raise ValueError(
                f"where: both states must hold the same number of sequences and keep must be bool [N]; got "
                f"{self.num_sequences} and {other.num_sequences} sequences, keep {keep.dtype} {list(keep.shape)}."
            )
        choose = lambda a, b: torch.where(keep.view(-1, *[1] * (a.dim() - 1)), a, b.to(a.dtype))  # noqa: E731
        return self._of(zip_tensors(choose, *_align_lengths(self._tree(), other._tree())))

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, atomically."""
        header = {"format": FORMAT, "version": str(VERSION), "signature": self.signature}
        header |= {"structure": json.dumps(structure(self._tree())), "note": json.dumps(self.note)}
        write_tensors(path, dict(tensors(self._tree())), header)

    def _tree(self) -> tuple:
        return (self.visits, self.position) if self.last is None else (self.visits, self.position, self.last)

    def _of(self, tree: tuple) -> "ModelState":
        visits, position, *last = tree
        return ModelState(visits, position, self.signature, self.note, *last)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "ModelState":
        return self._of(map_tensors(fn, self._tree()))


def load_state(path: str | Path) -> ModelState:
    """Read a state that `ModelState.save` wrote. Raises ValueError for a file that is damaged or not a state."""
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}. A state file is written by state.save(path) or generate --state-out.")
    header, found = read_tensors(path, "Is it a state file? Save the state again.")
    if header.get("format") != FORMAT or header.get("version") != str(VERSION):
        got = f"{header.get('format', 'no format')!r} version {header.get('version', '?')}"
        raise ValueError(f"{path} holds {got}; this library reads {FORMAT!r} version {VERSION}.")
    try:
        visits, position, *last = rebuild(json.loads(header["structure"]), found, "")
        return ModelState(visits, position, header["signature"], json.loads(header.get("note", "{}")), *last)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state file {path} has a structure this library does not know: {error}.") from error


def _rows(indices: Tensor, num_sequences: int) -> Tensor:
    """Sequence numbers [M] from numbers or a mask."""
    if indices.dtype == torch.bool and indices.shape == (num_sequences,):
        return indices.nonzero().flatten()
    rows = indices.long()
    whole = indices.numel() == 0 or not (indices.is_floating_point() or indices.dtype == torch.bool)
    # On a GPU a look at the numbers would stall the device; it asserts that they are in range itself.
    if (
        indices.dim() != 1
        or not whole
        or (rows.numel() and not rows.is_cuda and not 0 <= rows.min() <= rows.max() < num_sequences)
    ):
        raise ValueError(
            f"select: needs numbers of sequences from 0 to {num_sequences - 1}, or a mask of {num_sequences}; got "
            f"{indices.tolist()}."
        )
    return rows


def structure(tree: Any) -> Any:
    """The JSON description of a tree: null, "tensor", [children], or {"type": name, field: child}."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return "tensor"
    if not hasattr(tree, "_fields"):
        return [structure(child) for child in tree]
    fields = {field: structure(child) for field, child in zip(tree._fields, tree, strict=True)}
    return {"type": type(tree).__name__, "fields": fields}


def rebuild(structure: Any, found: Mapping[str, Tensor], name: str = "") -> Any:
    """The tree that `structure` describes, with the tensors `found` by their dotted names.

    Raises ValueError for a type that is not registered.
    """
    if structure is None:
        return None
    if structure == "tensor":
        return found[name]
    prefix = f"{name}." if name else ""
    if isinstance(structure, list):
        return tuple(rebuild(child, found, f"{prefix}{i}") for i, child in enumerate(structure))
    if structure["type"] not in _TYPES:
        raise ValueError(
            f"state type {structure['type']!r} is not registered; import the module that defines its layer"
        )
    fields = {field: rebuild(child, found, prefix + field) for field, child in structure["fields"].items()}
    return _TYPES[structure["type"]](**fields)


def _align_lengths(first: T, second: T) -> tuple[T, T]:
    """Left-pad with zeros where two caches hold a different number of past tokens (their dimension 1)."""

    def pad(a: Tensor, b: Tensor) -> Tensor:
        missing = b.shape[1] - a.shape[1] if a.dim() > 1 else 0
        return torch.cat([a.new_zeros(a.shape[0], missing, *a.shape[2:]), a], 1) if missing > 0 else a

    return zip_tensors(pad, first, second), zip_tensors(pad, second, first)
