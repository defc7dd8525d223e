"""The TTT kernels as jobs for `ahead_of_time.compile_for`: the arguments' types follow from their names."""

import importlib

import torch

from fastweight.ops.ttt.layout import (
    HIDDEN_BLOCK,
    KEEP_EVERY,
    LAUNCH,
    MARKS,
    Layout,
    block,
    launch_options,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {
    "position": "*i64",
    "cu_seqlens": "*i64",
    "suspects": "*i32",
    "owner": "*i32",
    "base": "*i32",
    "eps": "fp32",
}
SIZES = ("num_tokens", "num_sequences", "first", "stop", "memory_given", "sums_given", "H", "packed", "keep")
SIZES += ("num_rows", "turn", "to_sums")
TOKENS = ("q", "k", "v", "y", "dy", "dq", "dk", "dv", "all_w")  # in the dtype of q
TOKENS += ("d_reads", "actives", "d_middles", "d_hiddens", "d_writes1")
TOKENS += ("firsts", "seconds", "xs", "writes1", "slopes", "bends", "below1", "errors", "d_z1")  # while W is held


def job(name: str, dim: int, dtype: str = "bf16", chunk: int = 16, **constants: object) -> dict:
    """Kernel `name` for heads of `dim` channels."""
    late = "_reads" in name or "_backward" in name or "_keys" in name
    part = name.split("_")[0] + ("_held" if name.endswith("held") else "") + ("_backward" if late else "")
    part = "mlp_held_walk" if name in ("mlp_walk_held", "mlp_end_held") else part
    part = "step" if name.endswith("step") else part
    module = f"fastweight.ops.ttt.kernels_{part}"
    layout = Layout(1, 1, 1, dim, chunk, False, DTYPES[dtype])
    values = {
        "D": dim, "BLOCK_D": block(dim), "CHUNK": chunk, "BLOCK_K": block(chunk), "EVERY": KEEP_EVERY,
        "C": 4 * dim, "BLOCK_C": HIDDEN_BLOCK, "WHOLE": block(4 * dim),
        "WARPS": layout.warps if name.endswith("held") else None, "STEP": layout.reads,
        "OPENING": False, "UNFINISHED": False,
        "GUARD": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    } | constants  # fmt: skip
    parameters = importlib.import_module(module).__dict__[name].arg_names
    signature = {p: _type(p, dtype) for p in parameters}
    return {
        "kernel": f"{module}:{name}",
        "signature": signature,
        "constants": {p: values[p] for p in parameters if signature[p] == "constexpr"},
        **(launch_options(name, dim, DTYPES[dtype]) if name in LAUNCH else {"num_warps": 4}),
    }


def _type(parameter: str, dtype: str) -> str:
    if parameter.isupper() and parameter not in SIZES:
        return "constexpr"
    if parameter in SIZES:
        return "i32"
    if parameter == "flags":
        return {torch.int8: "*i8", torch.int16: "*i16"}[MARKS]
    return INTEGERS.get(parameter, f"*{dtype}" if parameter in TOKENS else "*fp32")
