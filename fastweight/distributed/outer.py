"""What replica groups that train alone for a while agree on: DiLoCo, or for one part of the model after another.

Sources: Douillard et al. 2023, arXiv:2311.08105; by parts (streaming): Douillard et al. 2025, arXiv:2501.18512.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastweight.configs import require
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.optim.cut import local

MOMENTUM = "momentum"


class Outer:
    """The weights that all groups had alike after the last exchange, and the momentum of the steps between exchanges.

    parameters: what this group trains, maybe cut over processes; it is read again at every exchange. fragments: the
    names of the parameters that are exchanged together.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: ReplicaConfig):
        dealt = deal(list(parameters), config.fragments)
        self.fragments = [[n for n, number in dealt.items() if number == i] for i in range(config.fragments)]
        require(
            all(self.fragments),
            f"replicas: fragments {config.fragments} are more than this model has layers or other weights. Lower it.",
        )
        self.lr, self.beta = config.outer_lr, config.outer_momentum
        self._parameters = dict(parameters)
        self._weights = {name: p.detach().clone() for name, p in parameters.items()}
        self._momentum = {name: torch.zeros_like(p) for name, p in self._weights.items()} if self.beta else {}

    @torch.no_grad()
    def moved(self, names: Sequence[str]) -> list[Tensor]:
        """How far the weights of this group have moved since the last exchange, start − end: this process's rows."""
        return [local(self._weights[name]) - local(self._parameters[name]) for name in names]

    @torch.no_grad()
    def update(self, names: Sequence[str], means: Sequence[Tensor], blend: float) -> None:
        """Move the common weights by the groups' mean of `moved`, and take them over; `blend`: part of the own weights
        that stays.

        SGD with Nesterov's momentum, as torch.optim.SGD has it.
        """
        for name, mean in zip(names, means, strict=True):
            step = mean
            if self.beta:
                momentum = local(self._momentum[name]).mul_(self.beta).add_(mean)
                step = mean.add(momentum, alpha=self.beta)
            weights = local(self._weights[name]).add_(step, alpha=-self.lr)
            own = local(self._parameters[name])
            own.copy_(torch.lerp(weights, own, blend) if blend else weights)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that is needed to go on: the weights by name, and "name|momentum"."""
        return {**self._weights, **{f"{name}|{MOMENTUM}": tensor for name, tensor in self._momentum.items()}}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises ValueError naming what does not fit."""
        own = self.state_tensors()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
        require(not wrong, f"outer weights: {', '.join(wrong[:5])} missing, unknown or of another shape.")
        for name, tensor in own.items():
            local(tensor).copy_(local(tensors[name]))


def deal(names: list[str], num_fragments: int) -> dict[str, int]:
    """Name of a parameter → its fragment.

    Layer l belongs to fragment l mod F, so that each has early and late layers; what lies outside the layers is dealt
    out in turn.
    """
    others, dealt = 0, {}
    for name in names:
        found = re.match(r"blocks\.(\d+)\.", name)
        if found is None:
            dealt[name], others = others % num_fragments, others + 1
        else:
            dealt[name] = int(found[1]) % num_fragments
    return dealt
