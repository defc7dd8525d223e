"""Kernels and their backward pass as one differentiable function."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = Callable[..., list[Tensor]]


def differentiable(
    traced: Run, run: Run, remember: Callable[[Any, tuple, list[Tensor]], None], backward: Callable[..., tuple],
    results: int,
) -> Run:  # fmt: skip
    """`run` with its derivative; inside torch.compile as the custom op `traced`, which costs the host far more.

    remember(ctx, inputs, output) saves what backward(ctx, gradients) needs; the last input says whether it will come.
    results: how many of the outputs are of use to the caller; the others are only there to be saved.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
            output = run(*inputs)
            remember(ctx, inputs, output)
            return tuple(output[:results])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:  # type: ignore[override]  # always by position
            return backward(ctx, gradients)

    def call(*inputs: Any) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return traced(*inputs)
        return Direct.apply(*inputs) if inputs[-1] else run(*inputs)

    return call  # type: ignore[return-value]
