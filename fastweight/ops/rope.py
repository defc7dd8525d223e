"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34): both channel layouts, and the scalings."""

import math
from typing import Any

import torch
from torch import Tensor

from fastweight.configs import check_keys, near_names, require

# What each scaling needs, beside its "kind". All are numbers but `truncate` (a bool) and `factors` (one per pair).
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "original_max_positions"),
    "longrope": ("factors", "attention_factor", "original_max_positions"),
}


def apply_rope(
    x: Tensor, positions: Tensor, *, base: float | None = None, rates: Tensor | None = None, scale: float = 1.0,
    interleaved: bool = False, rotary_dim: int | None = None,
) -> Tensor:  # fmt: skip
    """Rotate channel pairs of `x` by position · base^(-2i/rotary_dim), or by position · rates[i].

    x: [B, T, H, D]. positions: [B, T] (integers). rotary_dim: channels that rotate, the first ones; all by default.
    rates: [rotary_dim / 2] in place of base. scale: a factor on the rotated channels. interleaved: pairs are channels
    (2i, 2i+1); otherwise (i, i + rotary_dim/2), the "half-split" layout of GPT-NeoX.
    Angles are computed in float32, as every published implementation does; the result has x's dtype.
    """
    if rates is None:
        assert base is not None
        rates = plain_rates(base, x.shape[-1] if rotary_dim is None else rotary_dim, x.device)
    return rotate(x, rope_table(positions, rates, scale), interleaved=interleaved)


def rope_table(positions: Tensor, rates: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, dim/2], times scale, of positions [B, T]: one table serves all that rotates so."""
    angle = positions[..., None, None].float() * rates
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x: Tensor, table: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """`apply_rope` with a table: the first channels of x [B, T, H, D], as many as it has angles for, rotate."""
    cos, sin = table
    dim = 2 * cos.shape[-1]
    wide = x[..., :dim].to(torch.promote_types(x.dtype, torch.float32))
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    first, second = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(x.dtype), x[..., dim:]), -1) if dim < x.shape[-1] else turned.to(x.dtype)


@torch.inference_mode(False)  # layers keep what is made here for training, too
def plain_rates(base: float, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """base^(-2i/dim), [dim/2] float32: radians per position of each channel pair without scaling."""
    return base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@torch.inference_mode(False)  # as above
def rope_rates(base: float, dim: int, scaling: dict[str, Any] | None, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each of the dim / 2 channel pairs, float32.

    scaling: None for base^(-2i/dim), or one of SCALINGS as an object with its "kind": "linear" (positions divided by
    `factor`), "llama3" (Llama 3.1, arXiv:2407.21783: slow pairs divided, a smooth passage between), "yarn" (Peng et al.
    2023, arXiv:2309.00071, eq. 23), "longrope" (Ding et al. 2024, arXiv:2402.13753: a divisor per pair).
    """
    # Rounded in this order, as published decoders do: at position 10⁴ another order turns by another 10⁻³ radians.
    rates = 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return rates
    if scaling["kind"] == "linear":
        return rates / scaling["factor"]
    if scaling["kind"] == "llama3":
        return _llama3(rates, scaling)
    if scaling["kind"] == "yarn":
        return _yarn(rates, base, dim, scaling)
    factors = torch.tensor(scaling["factors"], dtype=torch.float32, device=device)
    return 1.0 / (factors * base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim))


def rope_scale(scaling: dict[str, Any] | None) -> float:
    """The factor on rotated channels that belongs to a scaling."""
    return 1.0 if scaling is None else float(scaling.get("attention_factor", 1.0))


def check_scaling(scaling: dict[str, Any] | None, dim: int) -> None:
    """Refuse a scaling of dim channels that is unknown or incomplete. dim: 0 if it is not known yet."""
    if scaling is None:
        return
    kind = scaling.get("kind")
    require(kind in SCALINGS, f"rope scaling: unknown kind {kind!r}.{near_names(str(kind), SCALINGS)}")
    check_keys(f"rope scaling {kind}", scaling, ("kind", *SCALINGS[str(kind)]), SCALINGS[str(kind)])
    for key in SCALINGS[str(kind)]:
        value = scaling[key]
        values = value if key == "factors" and isinstance(value, list) else [value]
        good = all(isinstance(v, int | float) and (v >= 0 if key == "truncate" else v > 0) for v in values)
        require(good, f"rope scaling {kind}: {key} must be positive, got {value!r}.")
    factors = scaling.get("factors")
    require(
        factors is None or dim == 0 or (isinstance(factors, list) and len(factors) == dim // 2),
        f"rope scaling {kind}: factors must be a list of {dim // 2} numbers, one per rotating pair, got {factors!r}.",
    )


def _llama3(rates: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Pairs that turn fewer than low_freq_factor times in the original context are slowed, fast ones are kept."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling["original_max_positions"] / (2 * math.pi / rates)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * rates / factor + kept * rates


def _yarn(rates: Tensor, base: float, dim: int, scaling: dict[str, Any]) -> Tensor:
    """Pairs that turn more than beta_fast times are kept, those below beta_slow slowed, a linear ramp between."""

    def pair(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        return dim * math.log(scaling["original_max_positions"] / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    last = last + 0.001 if last == first else last
    slowed = ((torch.arange(dim // 2, dtype=torch.float32, device=rates.device) - first) / (last - first)).clamp(0, 1)
    return rates / scaling["factor"] * slowed + rates * (1 - slowed)
