"""The TTT kernels compile for GPUs that are not here, and fit on them."""

import torch
from ahead_of_time import SHARED_LIMIT, compile_for
from interpreter import needs_triton
from ttt_jobs import job

from fastweight.ops.ttt.layout import HELD_SHARED, shared_bytes

pytestmark = needs_triton
# Bytes of local memory per thread, by head dimension (96 uses the tiles of 128): what there was, rounded up. More means
# that a change made a kernel outgrow the registers.
SPILLS = {
    64: {
        "linear_forward": 216, "linear_replay": 32, "linear_reads": 0, "linear_backward": 144, "linear_step": 0,
        "shared_totals": 0,
        "mlp_forward": 40, "mlp_reads": 64, "mlp_backward": 944, "mlp_step": 0,
        "mlp_forward_held": 640, "mlp_replay_held": 480, "mlp_reads_held": 184,
        "mlp_walk_held": 360, "mlp_end_held": 1936, "mlp_keys_held": 0,
    },
    32: {
        "mlp_forward_held": 320, "mlp_replay_held": 32, "mlp_reads_held": 0,
        "mlp_walk_held": 40, "mlp_end_held": 392, "mlp_keys_held": 0,
    },
    128: {"linear_forward": 1304, "linear_reads": 0, "linear_backward": 448, "mlp_forward": 704, "mlp_backward": 928},
}  # fmt: skip


def test_the_kernels_fit_on_a_hopper_gpu():
    cases = [(name, dim, most) for dim, spills in SPILLS.items() for name, most in spills.items()]
    found = compile_for(90, [job(name, dim) for name, dim, _ in cases])
    for (name, dim, most), kernel in zip(cases, found, strict=True):
        bound = 176 << 10 if name.endswith("held") else shared_bytes(dim, 16, torch.bfloat16)
        bound = HELD_SHARED if name == "mlp_walk_held" else bound
        assert kernel["shared"] <= min(SHARED_LIMIT, bound), name
        assert kernel["spills"] <= most, f"{name}, {dim}: {kernel['spills']} bytes of local memory per thread"
        assert kernel["wgmma"] or name not in ("mlp_forward_held", "mlp_walk_held", "mlp_end_held"), f"{name}, {dim}"


def test_the_reads_of_first_mini_batches_fit_on_a_hopper_gpu():
    (found,) = compile_for(90, [job("mlp_reads_held", 64, OPENING=True)])
    assert found["shared"] <= 176 << 10
    assert found["spills"] <= 1000


def test_an_unfinished_mini_batch_fits_on_a_hopper_gpu():
    (found,) = compile_for(90, [job("mlp_end_held", 64, UNFINISHED=True)])
    assert found["shared"] <= 176 << 10
    assert found["spills"] <= 1600


def test_a_kernel_compiles_for_an_ampere_gpu():
    (found,) = compile_for(80, [job("linear_forward", 64)])
    assert not found["wgmma"]
