"""What the memory of a LiZA layer is written and read with: unit-norm features and the further pairs of a token."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastweight.ops.conv import causal_conv

FEATURE_MAPS = ("silu", "identity", "softmax", "hedgehog")
TRICKS = ("derivative", "rotative", "combined")
SMALLEST_NORM = 1e-6


def features(kind: str, z: Tensor, weight: Tensor | None) -> Tensor:
    """Unit-norm features [B, T, H, F] of z [B, T, H, D].

    "silu": SiLU(z), "identity": z, "softmax": softmax(z), each over the channels of a head, F = D. "hedgehog":
    softmax([W z, −W z]) with W = weight [H, F / 2, D] (Hedgehog, Zhang et al. 2024, arXiv:2402.04347;
    the L2 norm takes out the softmax's own sum, so this is the form with exponentials, without their overflow).
    """
    if kind == "silu":
        z = F.silu(z)
    elif kind == "softmax":
        z = z.softmax(-1)
    elif kind == "hedgehog":
        assert weight is not None
        z = torch.einsum("bthd,hfd->bthf", z, weight.to(z.dtype))
        z = torch.cat([z, -z], -1).softmax(-1)
    return F.normalize(z, dim=-1, eps=SMALLEST_NORM)


def write_steps(
    pair: Tensor, order: int, trick: str, tail: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The `order` pairs that each token writes [B, T, order, H, C], its own last, and the new tail.

    pair: [B, T, H, C], key features and value of each token side by side. tail: [N, order - 1, H·C], the pairs of the
    tokens before (zeros at the start of a sequence); None with order 1 and "rotative". Step j > 0 writes
    "derivative": Δ^j / 2^j, the j-th backward difference, halved so that its key is never longer than 1;
    "rotative": the token's pair with channels (2i, 2i + 1) turned by 2πj / order; "combined": the mean of both.
    """
    steps = [pair]
    new_tail = tail
    for j in range(1, order):
        parts = []
        if trick != "rotative":
            assert tail is not None
            difference, new_tail = _difference(pair, j, order, tail, cu_seqlens)
            parts.append(difference)
        if trick != "derivative":
            parts.append(_turn(pair, 2 * math.pi * j / order))
        steps.append(torch.stack(parts).mean(0))
    return torch.stack(steps[::-1], 2), new_tail


def _difference(pair: Tensor, j: int, order: int, tail: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ_i (−1)^i binom(j, i) / 2^j · pair_{t−i}."""
    taps = [(-1) ** i * math.comb(j, i) / 2**j for i in range(order)]
    # Filled on the device: a step that is recorded cannot fetch numbers from the host.
    weight = torch.stack([pair.new_full((), tap) for tap in reversed(taps)]).expand(pair.shape[2] * pair.shape[3], -1)
    y, tail = causal_conv(pair.flatten(2), weight, None, tail, cu_seqlens=cu_seqlens)
    return y.view_as(pair), tail


def _turn(z: Tensor, angle: float) -> Tensor:
    even, odd = z[..., 0::2], z[..., 1::2]
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
