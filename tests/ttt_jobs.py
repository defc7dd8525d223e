"""The TTT kernels as jobs for `ahead_of_time.compile_for`: the arguments' types follow from their names."""

import importlib

import torch

from fastweight.ops.ttt.layout import HIDDEN_BLOCK, KEEP_EVERY, block, hidden_block, launch_options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {
    "position": "*i64",
    "cu_seqlens": "*i64",
    "flags": "*i8",
    "suspects": "*i32",
    "owner": "*i32",
    "base": "*i32",
    "eps": "fp32",
}
SIZES = ("num_tokens", "num_sequences", "first", "stop", "memory_given", "sums_given", "H", "packed", "keep")
TOKENS = ("q", "k", "v", "y", "dy", "dq", "dk", "dv", "all_w1", "all_w2", "all_w")  # in the dtype of q
TOKENS += ("d_reads", "xs", "slopes", "bends", "writes1", "actives", "d_middles", "d_hiddens", "d_writes1", "dz1")


def job(name: str, dim: int, dtype: str = "bf16", chunk: int = 16, **constants: int) -> dict:
    """Kernel `name` for heads of `dim` channels."""
    late = name.endswith(("reads", "backward", "keys"))
    step = name.endswith("step")
    part = "step" if step else name.split("_")[0] + ("_backward" if late else "")
    part = "mlp_reads" if name in ("mlp_replay", "mlp_reads", "mlp_keys") else part
    module = f"fastweight.ops.ttt.kernels_{part}"
    width = constants.get("C", 4 * dim)
    values = {
        "D": dim, "BLOCK_D": block(dim), "CHUNK": chunk, "BLOCK_K": block(chunk), "EVERY": KEEP_EVERY,
        "C": width, "BLOCK_C": HIDDEN_BLOCK if step else hidden_block(dim, width, chunk, DTYPES[dtype]),
        "GUARD": False, "OPENING": False, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    } | constants  # fmt: skip
    parameters = importlib.import_module(module).__dict__[name].arg_names
    signature = {p: _type(p, dtype) for p in parameters}
    return {
        "kernel": f"{module}:{name}",
        "signature": signature,
        "constants": {p: values[p] for p in parameters if signature[p] == "constexpr"},
        **launch_options(name, dim, DTYPES[dtype]),
    }


def _type(parameter: str, dtype: str) -> str:
    if parameter.isupper() and parameter not in SIZES:
        return "constexpr"
    if parameter in SIZES:
        return "i32"
    return INTEGERS.get(parameter, f"*{dtype}" if parameter in TOKENS else "*fp32")
