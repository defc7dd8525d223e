"""Element-wise work of a layer in few launches, for inference: decoding on a GPU is bound by their number.

Who calls asks `kernels_run` first, and has the same in torch's own steps: for gradients, for torch.compile, for
float64 and for other devices. What the kernels give differs from that by roundings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastweight.ops.kernels import KERNEL_DTYPES, why_no_kernels
from fastweight.ops.launch import block, launch

LARGEST = 16384  # channels of a row, all of which one program holds in registers
FLAT = 1024  # elements of a program without rows
FEW = 16  # tokens, of which each number is a program's own


def kernels_run(x: Tensor, *others: Tensor) -> bool:
    """Whether the functions below take such tensors, rows of the first being those they work on."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_cuda or why_no_kernels(x) is not None:
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device == x.device for t in (x, *others))
    return plain and 0 < x.shape[-1] <= LARGEST and x.numel() > 0 and all(t.dtype in KERNEL_DTYPES for t in others)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, gate: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps), of x [..., D]; times silu(gate) [...], plus base [..., D], in x's dtype."""
    from fastweight.ops.kernels_elementwise import rms_norm as kernel

    rows, out = _rows(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    given = [weight.contiguous(), *(x if t is None else t.contiguous() for t in (gate, base))]
    constants = {"EPS": eps, "GATED": gate is not None, "ADDED": base is not None}
    with torch.cuda.device_of(x):
        launch(
            kernel, (len(rows),), (rows, *given, out), (rows.stride(0),), constants | _width(x.shape[-1]),
            {"num_warps": _warps(x.shape[-1])},
        )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    from fastweight.ops.kernels_elementwise import gated as kernel

    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(up)
    with torch.cuda.device_of(up):
        launch(kernel, (-(-up.numel() // FLAT),), (gate, up, out), (up.numel(),), {"BLOCK": FLAT}, {"num_warps": 4})
    return out


def lact_heads(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, offset: Tensor, position: Tensor, rates: Tensor, *, num_heads: int,
    eps: float, silu: bool, v_silu: bool, fast_rope: bool,
) -> list[Tensor]:  # fmt: skip
    """Rotated q and k of attention, and q, k and v of num_heads fast networks, all [B, T, C] as q, k and v are.

    scale, offset: [C, 2]. position: [B], where the rows begin, or that of every token [B, T]. rates: [half a head].
    """
    from fastweight.ops.kernels_elementwise import lact_heads as kernel

    rows = [_rows(t) for t in (q, k, v)]
    out = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, q, k, v)]
    dim = q.shape[-1] // num_heads
    constants = {"EPS": eps, "SILU": silu, "V_SILU": silu and v_silu, "FAST_ROPE": fast_rope, "HALF": len(rates)}
    length = q.shape[1] if position.dim() == 1 else 1
    with torch.cuda.device_of(q):
        launch(
            kernel, (len(rows[0]), num_heads),
            (*rows, scale.contiguous(), offset.contiguous(), position.contiguous(), rates, *out),
            (length, *(t.stride(0) for t in rows)), constants | _width(dim), {"num_warps": _warps(dim)},
        )  # fmt: skip
    return out


def lact_rates(rate: Tensor, momentum: Tensor | None, shift: float) -> tuple[Tensor, Tensor | None]:
    """softplus(rate + shift) and sigmoid(momentum), float32."""
    from fastweight.ops.kernels_elementwise import lact_rates as kernel

    rate, other = rate.contiguous(), rate if momentum is None else momentum.contiguous()
    out = [torch.empty_like(t, dtype=torch.float32) for t in ([rate] if momentum is None else [rate, other])]
    counts = [rate.numel(), other.numel()]
    with torch.cuda.device_of(rate):
        launch(
            kernel, (-(-max(counts) // FLAT),), (rate, other, out[0], out[-1]), (*counts, shift),
            {"MOMENTUM": momentum is not None, "BLOCK": FLAT}, {"num_warps": 4},
        )  # fmt: skip
    return out[0], None if momentum is None else out[1]


def few_numbers(x: Tensor, *layers: nn.Module | None) -> bool:
    """Whether `lact_scalars` takes such layers, plain ones that nobody watches, and so few tokens."""
    there = [layer for layer in layers if layer is not None]
    if x[..., 0].numel() > FEW or torch.is_autocast_enabled(x.device.type):
        return False
    if any(type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks for layer in there):
        return False
    tensors = [t for layer in there for t in layer.parameters()]
    return all(t.dtype == x.dtype for t in tensors) and kernels_run(x, *tensors)


def lact_scalars(
    x: Tensor, rate: nn.Linear, momentum: nn.Linear | None, gate: nn.Linear | None, shift: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softplus(rate(x) + shift) and sigmoid(momentum(x)) in float32, and gate(x); all layers have biases."""
    from fastweight.ops.kernels_elementwise import lact_scalars as kernel

    layers = (rate, momentum, gate)
    counts = [0 if layer is None else layer.out_features for layer in layers]
    kinds = (torch.float32, torch.float32, x.dtype)
    out = [x.new_empty(*x.shape[:-1], n, dtype=dtype) for n, dtype in zip(counts, kinds, strict=True)]
    given = [t for layer in layers for t in ((layer or rate).weight, (layer or rate).bias)]
    x = x.contiguous()
    constants = dict(zip(("RATES", "MOMENTA", "GATES"), counts, strict=True)) | _width(x.shape[-1])
    with torch.cuda.device_of(x):
        launch(
            kernel, (x[..., 0].numel(), sum(counts)), (x, *given, *(t if t.numel() else x for t in out)), (shift,),
            constants, {"num_warps": 4},
        )  # fmt: skip
    return out[0], out[1] if momentum is not None else None, out[2] if gate is not None else None


def put_tokens(buffers: Sequence[Tensor], tokens: Sequence[Tensor], position: Tensor) -> None:
    """buffers[i][n, position[n] % slots] = tokens[i][n, 0], in place; three or four of each, [N, slots, ...] without
    gaps."""
    from fastweight.ops.kernels_elementwise import put_tokens as kernel

    tokens = [t.contiguous() for t in tokens]
    sizes = [t[0].numel() for t in tokens]
    spare = (buffers[0],) if len(buffers) == 3 else ()  # its size is zero
    constants = dict(zip(("A", "B", "C", "D"), (*sizes, 0), strict=False))
    with torch.cuda.device_of(position):
        launch(
            kernel, (len(position), -(-max(sizes) // FLAT)), (*buffers, *spare, *tokens, *spare, position),
            (buffers[0].shape[1],), constants | {"BLOCK": FLAT}, {"num_warps": 4},
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """[rows, D], a view if there is one; each row without gaps."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _width(size: int) -> dict[str, int]:
    return {"D": size, "BLOCK": block(size)}


def _warps(size: int) -> int:
    """Four elements per thread: where one row is all there is, it waits for its loads."""
    return min(8, max(1, block(size) // 128))
