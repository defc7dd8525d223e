"""The trained parameters of a model as a few flat vectors, one per fragment.

Fragments are strided: layer l belongs to fragment l mod F, so that each fragment has early and late layers (streaming
DiLoCo, Douillard et al. 2025, arXiv:2501.18512); what lies outside the layers is dealt out in turn. A shared parameter
has one place. Each parameter starts at a multiple of 128, so that no block of a codec holds two of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastweight.configs import require
from fastweight.diloco.seals import digest, to_bytes
from fastweight.distributed.outer import deal

ALIGNMENT = 128


class Place(NamedTuple):
    """Where a parameter lies in its fragment's vector."""

    name: str
    shape: tuple[int, ...]
    offset: int


class Layout:
    """Which parameter lies where. sizes: entries of each fragment's vector. digest: equal for equal layouts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], num_fragments: int):
        require(bool(shapes), "layout: the model has no trained parameters.")
        self.fragments: list[list[Place]] = [[] for _ in range(num_fragments)]
        ends = [0] * num_fragments
        for name, fragment in deal(list(shapes), num_fragments).items():
            shape = tuple(shapes[name])
            self.fragments[fragment].append(Place(name, shape, ends[fragment]))
            ends[fragment] += -(-_numel(shape) // ALIGNMENT) * ALIGNMENT
        empty = [i for i, places in enumerate(self.fragments) if not places]
        require(not empty, f"fragments: {num_fragments} are too many for {len(shapes)} parameters. Lower fragments.")
        self.sizes = ends
        self.digest = digest(to_bytes({"fragments": self.fragments}))

    @staticmethod
    def of(model: nn.Module, num_fragments: int) -> "Layout":
        """The layout of all parameters of `model` that need gradients. They must be float32."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        other = [name for name, p in trained.items() if p.dtype != torch.float32]
        require(not other, f"layout: float32 parameters are needed, {', '.join(other[:3])} are of another dtype.")
        return Layout({name: tuple(p.shape) for name, p in trained.items()}, num_fragments)

    def num_parameters(self) -> int:
        """Trained numbers, without the gaps between them."""
        return sum(_numel(place.shape) for places in self.fragments for place in places)

    @torch.no_grad()
    def read(self, model: nn.Module, fragment: int) -> Tensor:
        """The parameters of one fragment, float32 [sizes[fragment]] on the CPU; zeros in the gaps."""
        flat = torch.zeros(self.sizes[fragment])
        for place in self.fragments[fragment]:
            values = model.get_parameter(place.name).detach().reshape(-1)
            flat[place.offset : place.offset + values.numel()] = values.cpu()
        return flat

    @torch.no_grad()
    def write(self, model: nn.Module, fragment: int, flat: Tensor) -> None:
        """Put a fragment's vector into the parameters."""
        for place in self.fragments[fragment]:
            parameter = model.get_parameter(place.name)
            values = flat[place.offset : place.offset + parameter.numel()]
            parameter.copy_(values.view(parameter.shape))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
