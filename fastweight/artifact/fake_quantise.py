"""Training that knows it will be rounded: weights are seen through the quantiser, gradients pass it by."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastweight.artifact.groups import REST_GROUP, tensor_groups
from fastweight.artifact.rows import divisors, row_scales
from fastweight.artifact.spec import GroupSpec, PackSpec
from fastweight.configs import near_names, require
from fastweight.model import Model

MODES = ("round", "noise")


def fake_quantise(weight: Tensor, settings: GroupSpec, mode: str = "round") -> Tensor:
    """`weight` [rows, columns] as it would be read back, with the gradient of the identity (straight-through).

    mode: "round" rounds to the nearest step and clips; "noise" adds uniform noise of one step's width instead, which
    has the same variance and no steps (arXiv:2004.07320 compares both).
    """
    require(mode in MODES, f"fake_quantise: unknown mode {mode!r}.{near_names(mode, MODES)}")
    with torch.no_grad():
        scales = row_scales(weight, settings.clip, settings.qmax)
        steps = divisors(scales, torch.promote_types(weight.dtype, torch.float32))[:, None]
        if mode == "noise":
            change = (torch.rand_like(weight) - 0.5) * steps * (scales > 0)[:, None]
        else:
            codes = (weight / steps).round().clamp(-settings.qmax, settings.qmax)
            change = codes * steps - weight
    return weight + change.to(weight.dtype)


@contextlib.contextmanager
def fake_quantised(
    model: Model, spec: PackSpec, *, blocks: Iterable[int] | None = None, mode: str = "round"
) -> Iterator[Model]:
    """Inside, the linear layers of `blocks` compute with fake-quantised weights; parameters and their names stay.

    blocks: indices; by default those that `order` visits more than once, where errors of rounding add up. The backward
    pass of a checkpointed model must run inside, too. Layers whose owner uses their weight directly are not reached.
    """
    visits = model.config.visits
    chosen = {i for i in visits if visits.count(i) > 1} if blocks is None else set(blocks)
    wrong = sorted(chosen - set(visits))
    require(not wrong, f"fake_quantised: block(s) {wrong} do not exist; there are {len(model.config.blocks)}.")
    handles = []
    for name, group in tensor_groups(model).items():
        owner = name.removesuffix(".weight")
        inside = name.startswith("blocks.") and int(name.split(".")[1]) in chosen
        if not inside or group == REST_GROUP:
            continue
        part = model.get_submodule(owner)
        handles.append(part.register_forward_pre_hook(_shadow(spec.group(group), mode)))
        handles.append(part.register_forward_hook(_unshadow, always_call=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _shadow(settings: GroupSpec, mode: str) -> Any:
    """An attribute of the instance hides the parameter of the same name for the time of one call."""

    def hook(part: nn.Module, _inputs: Any) -> None:
        weight = part.get_parameter("weight")
        part.__dict__["weight"] = fake_quantise(weight, settings, mode)

    return hook


def _unshadow(part: nn.Module, _inputs: Any, _output: Any) -> None:
    part.__dict__.pop("weight", None)
