"""The rotation of a config.json: `rope_parameters` of today's files, `rope_theta` and `rope_scaling` of older ones."""

import math
from typing import Any

from fastweight.configs import near_names, require
from fastweight.convert.folders import check_number
from fastweight.convert.pretrained.settings import LAYER_TYPES, Settings

KNOWN = ("default", "linear", "llama3", "longrope", "yarn")


def rotation(
    c: Settings, head_dim: int, *, theta: float = 10000.0, theta_key: str = "rope_theta", layer_type: str | None = None,
    partial: float = 1.0, partial_key: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """rope_base, rotary_dim and rope_scaling for an AttentionConfig.

    theta, partial: the family's defaults. theta_key, partial_key: where its older files hold them; no partial_key: all
    channels rotate. layer_type: where the parameters are one object per kind of layer, the one to take.
    """
    given = parameters(c, layer_type)
    base = _number(c, "rope_theta", given.get("rope_theta", c.data.get(theta_key)), theta)
    partial = _number(c, "partial_rotary_factor", _partial(c, given, partial_key), partial)
    rotary_dim = int(head_dim * partial)
    require(
        0 < rotary_dim <= head_dim,
        f"{c.family}: partial_rotary_factor {partial} turns {rotary_dim} of {head_dim} channels; needs some of them.",
    )
    scaling = _scaling(c, given, nested=layer_type is not None)
    return {"rope_base": base, "rotary_dim": 0 if rotary_dim == head_dim else rotary_dim, "rope_scaling": scaling}


def parameters(c: Settings, layer_type: str | None = None) -> dict[str, Any]:
    """The file's object of rope parameters, empty if it has none."""
    found = c.data.get("rope_scaling") or c.data.get("rope_parameters") or {}
    require(isinstance(found, dict), f"{c.family}: rope parameters must be an object, got {type(found).__name__}.")
    nested = [key for key in LAYER_TYPES if key in found]
    require(
        not nested or layer_type is not None,
        f"{c.family}: rope parameters for each layer type ({', '.join(nested)}) are not supported here.",
    )
    return (found.get(layer_type) or {}) if nested else found


def _partial(c: Settings, given: dict[str, Any], partial_key: str | None) -> Any:
    value = given.get("partial_rotary_factor", c.data.get(partial_key or "partial_rotary_factor"))
    whole = partial_key is not None or value is None or value == 1
    require(whole, f"{c.family}: partial_rotary_factor is {value!r}; only 1 is supported for this family.")
    return value


def _scaling(c: Settings, given: dict[str, Any], *, nested: bool) -> dict[str, Any] | None:
    kind = given.get("rope_type", given.get("type")) or "default"
    if kind == "default":
        return None
    require(
        kind != "dynamic",
        f'{c.family}: rope_type "dynamic" turns earlier tokens anew when the text grows, which a state that has read '
        "them cannot follow. It is not supported; linear, llama3, longrope and yarn are.",
    )
    require(kind in KNOWN, f"{c.family}: rope_type {kind!r} is not supported.{near_names(str(kind), KNOWN)}")
    if kind == "linear":
        return {"kind": kind, "factor": _number(c, "factor", given.get("factor"))}
    original = _original_length(c, given, nested)
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return {"kind": kind, "original_max_positions": original} | {k: _number(c, k, given.get(k)) for k in keys}
    factor = given.get("factor")
    factor = c.size("max_position_embeddings") / original if factor is None else _number(c, "factor", factor)
    return (_yarn if kind == "yarn" else _longrope)(c, given, factor, original)


def _original_length(c: Settings, given: dict[str, Any], nested: bool) -> int:
    """The context before scaling. One for the whole model, outside the parameters, comes first."""
    key = "original_max_position_embeddings"
    value = given.get(key) if nested else c.data.get(key) or given.get(key)
    length = c.size("max_position_embeddings") if value is None else int(_number(c, key, value))
    require(length > 1, f"{c.family}: rope {key} must exceed 1, got {length}.")
    return length


def _yarn(c: Settings, given: dict[str, Any], factor: float, original: int) -> dict[str, Any]:
    numerator, denominator = (_number(c, key, given.get(key), 0) for key in ("mscale", "mscale_all_dim"))
    attention = given.get("attention_factor")
    if attention is None:
        both = bool(numerator and denominator)
        attention = _temperature(factor, numerator if both else 1) / (_temperature(factor, denominator) if both else 1)
    return {
        "kind": "yarn",
        "factor": factor,
        "beta_fast": _number(c, "beta_fast", given.get("beta_fast") or 32),
        "beta_slow": _number(c, "beta_slow", given.get("beta_slow") or 1),
        "truncate": bool(given.get("truncate", True)),
        "attention_factor": _number(c, "attention_factor", attention),
        "original_max_positions": original,
    }


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(c: Settings, given: dict[str, Any], factor: float, original: int) -> dict[str, Any]:
    attention = given.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short = given.get("short_factor")
    require(isinstance(short, list), f"{c.family}: longrope needs short_factor, a list of numbers, got {short!r}.")
    assert isinstance(short, list)
    factors = [_number(c, "short_factor", value) for value in short]
    attention = _number(c, "attention_factor", attention)
    return {"kind": "longrope", "factors": factors, "attention_factor": attention, "original_max_positions": original}


def _number(c: Settings, key: str, value: Any, default: float | None = None) -> float:
    value = default if value is None else value
    require(value is not None, f"{c.family}: the rope parameters lack {key}.")
    return check_number(f"{c.family}: rope {key}", float, value)
