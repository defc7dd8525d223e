"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), both channel layouts in use."""

import torch
from torch import Tensor


def apply_rope(
    x: Tensor, positions: Tensor, *, base: float, interleaved: bool = False, rotary_dim: int | None = None
) -> Tensor:
    """Rotate channel pairs of `x` by position · base^(-2i/rotary_dim).

    x: [B, T, H, D]. positions: [B, T] (integers). rotary_dim: channels that rotate, the first ones; all by default.
    interleaved: pairs are channels (2i, 2i+1); otherwise (i, i + rotary_dim/2), the "half-split" layout of GPT-NeoX.
    Angles are computed in float32, as every published implementation does; the result has x's dtype.
    """
    dim = x.shape[-1] if rotary_dim is None else rotary_dim
    rate = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = positions[..., None, None].float() * rate  # [B, T, 1, dim/2]
    cos, sin = angle.cos(), angle.sin()
    wide = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32))
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    first, second = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), -1) if dim < x.shape[-1] else turned.to(x.dtype)
