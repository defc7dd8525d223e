"""One optimiser for a whole model: AdamW, and Muon for the hidden matrices, driven as one and saved without pickle."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastweight.configs import require
from fastweight.optim.groups import OptimizerConfig, ParameterGroup, muon_momentum, parameter_groups
from fastweight.optim.muon import Muon


class Optimizer:
    """The optimisers of one model, stepped together.

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
        self._decays = [[group["weight_decay"] for group in part.param_groups] for part in self.parts]
        self._names = {p: name for group in self.groups for name, p in group.parameters}

    def parameters(self) -> Iterable[nn.Parameter]:
        """All trained parameters."""
        return self._names

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to `factor` times its peak."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def set_decay_factor(self, factor: float) -> None:
        """Set every weight decay to `factor` times its own."""
        for part, decays in zip(self.parts, self._decays, strict=True):
            for group, decay in zip(part.param_groups, decays, strict=True):
                group["weight_decay"] = decay * factor

    def set_step(self, step: int) -> None:
        """Set Muon's momentum to that of update `step` (0, 1, ...); without this call it is that after the warm-up."""
        for group in (group for part in self.parts if isinstance(part, Muon) for group in part.param_groups):
            group["momentum"] = muon_momentum(self.config, step)

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
        unknown = sorted(set(entries) - set(self._names.values()))
        require(not unknown, f"optimizer state: this model has no parameter {', '.join(unknown[:5])}.")
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                name = self._names[p]
                if name in entries:
                    _check_entry(name, entries[name], _state_shapes(part, p))
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


def _state_shapes(part: torch.optim.Optimizer, p: Tensor) -> dict[str, tuple[int, ...]]:
    """What `part` remembers of the parameter `p` after its first step, and its shape."""
    if isinstance(part, Muon):
        return part.state_shapes(p)
    return {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}


def _check_entry(name: str, entry: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    missing = [f"{name}|{key}" for key in wanted if key not in entry]
    require(not missing, f"optimizer state: {', '.join(missing)} is missing.")
    foreign = [f"{name}|{key}" for key in entry if key not in wanted]
    require(not foreign, f"optimizer state: {', '.join(foreign)} belongs to another optimiser or variant.")
    for key, shape in wanted.items():
        found = list(entry[key].shape)
        require(found == list(shape), f"optimizer state: {name}|{key} is {found}, needs {list(shape)}.")


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
    return Muon(
        _torch_groups(groups, config.muon_lr or config.lr, config.weight_decay),
        lr=config.muon_lr or config.lr,
        momentum=config.muon_momentum,
        steps=config.muon_steps,
        coefficients=config.muon_coefficients,
        scale=config.muon_scale,
        rows=config.muon_rows,
        normuon=config.normuon,
        normuon_beta=config.normuon_beta,
        cautious=config.muon_cautious,
        dtype=config.muon_dtype,
    )
