"""Positions and faults after a call, from the tokens that a backend marked."""

import torch
from torch import Tensor

from fastweight.ops.launch import launch
from fastweight.ops.sequences import advance, count_faults
from fastweight.state import Faults

BLOCK = 8192  # marks that one program looks at together


def account(position: Tensor, faults: Faults, marks: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Faults]:
    """The new positions [N] and faults. marks: bool [B, T], or integers [B, T, H] of heads, from kernels."""
    if marks.dim() == 2 or torch.compiler.is_compiling():
        bad = marks if marks.dim() == 2 else (marks > 0).any(-1)
        return advance(position, marks.shape[1], cu_seqlens), count_faults(faults, bad, position, cu_seqlens)
    from fastweight.ops.kernels_faults import count_marks

    if len(devices := {t.device for t in (marks, position, *faults)}) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the state's position and faults must be on the device of q, got {found}. Move them there.")
    _, length, heads = marks.shape
    given = [t.contiguous() for t in (position, *faults)]
    after, count, first = results = [torch.empty_like(t) for t in given]
    ends = position if cu_seqlens is None else cu_seqlens.to(position.device)
    wide = min(64, 1 << (heads - 1).bit_length())
    sizes = {"BLOCK_T": 16 if length == 1 else BLOCK // wide, "BLOCK_H": wide}
    with torch.cuda.device_of(marks):
        launch(
            count_marks, (len(position),), (marks, ends, *given, *results), (length, heads),
            {"packed": int(cu_seqlens is not None), **sizes}, {"num_warps": 1 if length == 1 else 8},
        )  # fmt: skip
    return after, Faults(count, first)
