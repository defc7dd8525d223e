"""Tensor names of pretrained decoders beside ours, and the ways their layouts differ: stacked, transposed, by head."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastweight.mixers.attention import AttentionLayer
from fastweight.model import Model


class Layout(NamedTuple):
    """read: one of their tensors with the rows in our order. write: back. Both take the number of heads too."""

    read: Callable[[Tensor, int], Tensor]
    write: Callable[[Tensor, int], Tensor]


def _same(x: Tensor, heads: int) -> Tensor:
    return x


def _transposed(x: Tensor, heads: int) -> Tensor:
    return x.t() if x.dim() == 2 else x


def _from_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


PLAIN = Layout(_same, _same)
TRANSPOSED = Layout(_transposed, _transposed)  # matrices with the input channels first (GPT-2)
BY_HEAD = Layout(_from_heads, _to_heads)  # rows q, k, v of head 0, then those of head 1, … (GPT-NeoX)


class Rule(NamedTuple):
    """Some of our modules hold the rows of some of theirs, in order, weights and biases alike."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout = PLAIN


class Entry(NamedTuple):
    """A rule for tensors. rows: of each of theirs, in our order of rows. sizes: of each of ours."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    heads: int

    def read(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """Our tensors from theirs."""
        whole = [self.layout.read(part, self.heads) for part in parts]
        joined = torch.cat(whole) if len(whole) > 1 else whole[0]
        # Copies: tensors that share memory cannot be saved side by side.
        found = [joined] if len(self.ours) == 1 else [x.clone() for x in joined.split(self.sizes)]
        return dict(zip(self.ours, (x.contiguous() for x in found), strict=True))

    def write(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours."""
        parts = [weights[name] for name in self.ours]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        found = [joined] if len(self.theirs) == 1 else [x.clone() for x in joined.split(self.rows)]
        written = (self.layout.write(x, self.heads).contiguous() for x in found)
        return dict(zip(self.theirs, written, strict=True))


def entries(model: Model, outside: Iterable[Rule], inside: Iterable[Rule], layers: str) -> list[Entry]:
    """An entry per tensor of the model. inside: rules within a block; layers: the prefix of theirs, with {} for i."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = [entry for rule in outside for entry in _expand(rule, shapes, None)]
    for i, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{i}.", layers.format(i)
        for rule in inside:
            names = tuple(ours + name for name in rule.ours), tuple(theirs + name for name in rule.theirs)
            found += _expand(Rule(*names, rule.layout), shapes, block.mixer)
    left = shapes.keys() - {name for entry in found for name in entry.ours}
    assert not left, f"no rule for {sorted(left)}"
    return found


def _expand(rule: Rule, shapes: dict[str, Any], mixer: Any) -> list[Entry]:
    """The rule for weight and bias, where this model has them."""
    found = []
    for kind in ("weight", "bias"):
        ours = tuple(f"{name}.{kind}" for name in rule.ours)
        if ours[0] in shapes:
            sizes = tuple(shapes[name][0] for name in ours)
            assert len(rule.theirs) in (1, 3)  # three: q, k, v
            rows = tuple(mixer.sizes) if len(rule.theirs) == 3 else (sum(sizes),)
            heads = mixer.config.num_heads if isinstance(mixer, AttentionLayer) else 0
            found.append(Entry(ours, tuple(f"{n}.{kind}" for n in rule.theirs), rule.layout, rows, sizes, heads))
    return found
