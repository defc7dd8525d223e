"""One token for each sequence, without a backward pass, as one kernel."""

import torch
from torch import Tensor

from fastweight.ops.ttt.layout import Layout, empty_marks


@torch.library.custom_op("fastweight::ttt_step", mutates_args=())
def step(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    memory: list[Tensor], sums: list[Tensor], position: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    """y, the new memory, the new sums, flags [N, 1, H]. q: [N, 1, H, D]. memory, sums: W, b or W1, b1, W2, b2."""
    from fastweight.ops.ttt.kernels_step import linear_step, mlp_step

    results = _results(q, k, v, rate, tau, ln_weight, ln_bias, memory, sums, position, eps)
    layout = Layout.of(q, tau, None)
    wanted = ("D", "BLOCK_D", "CHUNK") if len(memory) == 2 else ("D", "BLOCK_D", "CHUNK", "C", "BLOCK_C")
    constants = layout.constants(memory[0].shape[-1])
    with torch.cuda.device_of(q):
        layout.launch(
            linear_step if len(memory) == 2 else mlp_step, (layout.sequences * layout.heads,),
            q, k, v, rate, tau, ln_weight, ln_bias, *memory, *sums, position, *results, eps, layout.heads,
            **{name: constants[name] for name in wanted},
        )  # fmt: skip
    return results


@step.register_fake
def _results(
    q: Tensor, k: Tensor, v: Tensor, rate: Tensor, tau: Tensor, ln_weight: Tensor, ln_bias: Tensor,
    memory: list[Tensor], sums: list[Tensor], position: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    flags = empty_marks(q)
    return [torch.empty_like(q), *(torch.empty_like(x) for x in (*memory, *sums)), flags]
