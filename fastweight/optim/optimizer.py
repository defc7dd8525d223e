"""One optimiser for a whole model: AdamW, and Muon for the hidden matrices, driven as one and saved without pickle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastweight.configs import require
from fastweight.optim.groups import OptimizerConfig, ParameterGroup, parameter_groups

# What each optimiser remembers of a parameter after its first step.
STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


class Optimizer:
    """The torch optimisers of one model, stepped together.

    `state_tensors()` and `load_state_tensors()` turn everything they remember into named tensors and back, bit by bit.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig):
        self.config = config
        self.groups = parameter_groups(model, config)
        self.parts = [
            make([group for group in self.groups if group.optimizer == name], config)
            for name, make in (("muon", _muon), ("adamw", _adamw))
            if any(group.optimizer == name for group in self.groups)
        ]
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self._names = {p: name for group in self.groups for name, p in group.parameters}

    def parameters(self) -> Iterable[nn.Parameter]:
        """All trained parameters."""
        return self._names

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def step(self) -> None:
        """Apply the gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything the optimisers remember, as "parameter|quantity" → tensor."""
        return {
            f"{name}|{key}": value.detach()
            for part in self.parts
            for p, name in self._names.items()
            for key, value in part.state.get(p, {}).items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises ValueError naming what does not fit the model."""
        entries = _by_parameter(tensors)
        shapes = {name: p.shape for p, name in self._names.items()}
        unknown = sorted(set(entries) - set(shapes))
        require(not unknown, f"optimizer state: this model has no parameter {', '.join(unknown[:5])}.")
        for name, entry in entries.items():
            for key, value in entry.items():
                fits = value.dim() == 0 or value.shape == shapes[name]
                require(fits, f"optimizer state: {name}|{key} is {list(value.shape)}, needs {list(shapes[name])}.")
        for part in self.parts:
            wanted = STATE[type(part)]
            for name in (self._names[p] for group in part.param_groups for p in group["params"]):
                missing = [f"{name}|{key}" for key in wanted if name in entries and key not in entries[name]]
                require(not missing, f"optimizer state: {', '.join(missing)} is missing.")
            self._load_part(part, entries)

    def _load_part(self, part: torch.optim.Optimizer, entries: dict[str, dict[str, Tensor]]) -> None:
        # load_state_dict numbers the parameters through all groups and knows where each quantity must live.
        layout = part.state_dict()
        parameters = [p for group in part.param_groups for p in group["params"]]
        names = [self._names[p] for p in parameters]
        layout["state"] = {i: entries[name] for i, name in enumerate(names) if name in entries}
        part.load_state_dict(layout)


def _by_parameter(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("|")
        entries.setdefault(name, {})[quantity] = value
    return entries


def _torch_groups(groups: list[ParameterGroup], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return [
        {
            "params": [p for _, p in group.parameters],
            "lr": lr * group.factor,
            "weight_decay": weight_decay if group.decays else 0.0,
        }
        for group in groups
    ]


def _adamw(groups: list[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for _, p in group.parameters)
    return torch.optim.AdamW(
        _torch_groups(groups, config.lr, config.weight_decay), betas=config.betas, eps=config.eps, fused=fused
    )


def _muon(groups: list[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Muon(
        _torch_groups(groups, config.muon_lr or config.lr, config.weight_decay),
        momentum=config.muon_momentum,
        ns_steps=config.muon_steps,
        adjust_lr_fn=config.muon_scale,
    )
