"""What TPTT's options mean for `titanize`; the ones without a meaning here are refused by name."""

from typing import Any

from fastweight.configs import near_names, require

# operator_mode: (gated, order, trick).
MODES: dict[str, tuple[bool, int, str]] = {
    "delta_rule": (False, 1, "derivative"),
    "delta_rule_v": (False, 1, "derivative"),
    "delta_rule_kv": (False, 1, "derivative"),
    "gated_delta_rule": (True, 1, "derivative"),
    "delta_product": (False, 2, "derivative"),
    "gated_delta_product": (True, 2, "derivative"),
    "delta_product_r": (False, 2, "rotative"),
    "delta_product_c": (False, 2, "combined"),
}
REFUSED_MODES = {
    "delta_rule_gelu": "a function applied between chunks makes the output depend on where chunks end",
    "gla": "it is not a delta rule; a model of gated linear attention is made with DeltaConfig",
}
ALPHA_GATES = {"c": False, "k": True, "v": True, "kv": True}
BETA_GATES = ("k", "v", "kv")
TRICKS = {"dt": "derivative", "rot": "rotative", "rdt": "combined"}
ATTENTION = ("eager", "sdpa")
WHOLE_ATTENTION = {"attn", "self_attn", "attention"}

# Options that say nothing here: TPTT's own default passes, anything else is refused with this reason.
FIXED: dict[str, tuple[Any, str]] = {
    "base_model_config": (None, "the settings come with the weights that base_model_name names"),
    "base_model_subfolder": (None, "give the path of the subfolder as base_model_name"),
    "model_task": ("causal_lm", "models here are causal language models"),
    "use_linear_checkpoint": (None, "use gradient checkpointing of the Trainer, which covers every block"),
    "base_scale_attn": (False, "the memory's output keeps its own scale"),
    "cross_gate": (False, "the branches are mixed by their weighted sum alone"),
    "linear_precision": ("float32", "the memory is float32, or wider in a wider model"),
    "bidirectional": (False, "a memory that reads from the end could not generate"),
    "pooling_config": (None, "it has no use in TPTT either"),
}


def check_fixed(given: dict[str, Any]) -> None:
    """Refuse options that have no meaning here, unless they ask for what happens anyway."""
    for name, value in given.items():
        usual, reason = FIXED[name]
        same = value is None or value == usual or str(value).removeprefix("torch.") == usual
        require(same, f"TPTT option {name}={value!r}: {reason}. Leave {name} out.")


def operator_options(
    mode: str | None, order: int | None, alpha: str | None, beta: str | None, linear: bool | None, trick: str | None
) -> dict[str, Any]:
    """gated, order and trick of `titanize` for a named operator_mode, or for TPTT's single settings of an operator."""
    own = {"order": order, "alpha_gate": alpha, "beta_gate": beta, "linear": linear, "trick": trick}
    for name, value in {"operator_mode": mode, "alpha_gate": alpha, "beta_gate": beta, "trick": trick}.items():
        require(value is None or isinstance(value, str), f"TPTT: {name} must be a text, got {value!r}.")
    given = [name for name, value in own.items() if value is not None]
    if mode is not None:
        require(
            not given,
            f"TPTT options {', '.join(given)}: operator_mode {mode!r} fixes them. Give one or the others.",
        )
        require(mode not in REFUSED_MODES, f"TPTT operator_mode {mode!r}: {REFUSED_MODES.get(mode)}.")
        require(mode in MODES, f"TPTT: unknown operator_mode {mode!r}.{near_names(str(mode), MODES)}")
        return dict(zip(("gated", "order", "trick"), MODES[mode], strict=True))
    alpha, beta, trick = (usual if v is None else v for v, usual in ((alpha, "c"), (beta, "k"), (trick, "dt")))
    require(alpha in ALPHA_GATES, f"TPTT: unknown alpha_gate {alpha!r}.{near_names(str(alpha), ALPHA_GATES)}")
    require(
        beta in BETA_GATES,
        f"TPTT: beta_gate must be one of {', '.join(BETA_GATES)} (all mean a learned write strength), got {beta!r}.",
    )
    trick = trick if trick in TRICKS.values() else TRICKS.get(trick, trick)
    require(trick in TRICKS.values(), f"TPTT: unknown trick {trick!r}.{near_names(str(trick), TRICKS)}")
    require(linear is not False, f"TPTT option linear=False: {REFUSED_MODES['delta_rule_gelu']}. Leave it out.")
    order = 1 if order is None else order
    whole = isinstance(order, int) and not isinstance(order, bool) and order >= 1
    require(whole, f"TPTT: order must be a whole number from 1, got {order!r}.")
    return {"gated": ALPHA_GATES[alpha], "order": order, "trick": trick}


def check_unused(max_chunk_size: Any, padding_side: Any) -> None:
    """Refuse values that TPTT could not take either, of options that change nothing here."""
    require(
        isinstance(max_chunk_size, int) and not isinstance(max_chunk_size, bool) and max_chunk_size > 0,
        f"TPTT: max_chunk_size must be a positive number of tokens, got {max_chunk_size!r}.",
    )
    require(
        padding_side in (None, "left", "right"), f"TPTT: padding_side must be 'left' or 'right', got {padding_side!r}."
    )


def check_layers(layers: Any) -> None:
    """Refuse what cannot name layers of any model; the rest shows when the model is known."""
    good = isinstance(layers, (str, int, list, tuple)) and not isinstance(layers, bool)
    require(good, f"TPTT: layers must be a text, a list of numbers or a budget, got {layers!r}.")


def check_attention(name: Any) -> None:
    """Refuse attention implementations of transformers that cannot honour a mask, and unknown ones."""
    require(
        name in (None, *ATTENTION),
        f"attn_implementation {name!r}: only {' and '.join(map(repr, ATTENTION))} honour every mask, and both mean the "
        "library's own attention here. Leave it out.",
    )


def check_targets(names: Any) -> None:
    """Only "the attention modules" can be named TPTT's way."""
    require(
        names is None or set(names) <= WHOLE_ATTENTION,
        f"TPTT option target_modules_names={names!r}: choose attention layers with layers, as in titanize: "
        '"all", a list, "0-5,9", "every 3", "last 4".',
    )
