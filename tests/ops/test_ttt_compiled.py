"""The TTT kernels compile for GPUs that are not here, and fit on them."""

import torch
from ahead_of_time import SHARED_LIMIT, compile_for
from interpreter import needs_triton
from ttt_jobs import job

from fastweight.ops.ttt.layout import shared_bytes

pytestmark = needs_triton
# Bytes of local memory per thread, by head dimension (96 uses the tiles of 128): what there was, rounded up. More means
# that a change made a kernel outgrow the registers.
SPILLS = {
    64: {
        "linear_forward": 216, "linear_replay": 24, "linear_reads": 0, "linear_backward": 216, "linear_step": 0,
        "shared_totals": 0,
        "mlp_forward": 576, "mlp_reads": 128, "mlp_backward": 1088, "mlp_step": 0,
    },
    128: {"linear_forward": 1304, "linear_reads": 0, "linear_backward": 640, "mlp_forward": 704, "mlp_backward": 896},
}  # fmt: skip


def test_the_kernels_fit_on_a_hopper_gpu():
    cases = [(name, dim, most) for dim, spills in SPILLS.items() for name, most in spills.items()]
    found = compile_for(90, [job(name, dim) for name, dim, _ in cases])
    for (name, dim, most), kernel in zip(cases, found, strict=True):
        assert kernel["shared"] <= min(SHARED_LIMIT, shared_bytes(dim, 16, torch.bfloat16)), name
        assert kernel["spills"] <= most, f"{name}, {dim}: {kernel['spills']} bytes of local memory per thread"


def test_a_kernel_compiles_for_an_ampere_gpu():
    (found,) = compile_for(80, [job("linear_forward", 64)])
    assert not found["wgmma"]
