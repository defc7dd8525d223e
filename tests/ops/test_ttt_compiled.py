"""The TTT kernels compile for GPUs that are not here, and fit on them."""

import pytest
from ahead_of_time import SHARED_LIMIT, compile_for
from interpreter import needs_triton
from ttt_jobs import job

pytestmark = needs_triton
# Bytes of local memory per thread, by head dimension (96 uses the tiles of 128): what there was, rounded up. More means
# that a change made a kernel outgrow the registers.
SPILLS = {
    64: {
        "linear_forward": 192, "linear_replay": 0, "linear_backward": 1088, "linear_step": 0,
        "mlp_forward": 576, "mlp_replay": 64, "mlp_reads": 128, "mlp_backward": 960, "mlp_step": 0,
    },
    128: {"linear_forward": 1088, "linear_backward": 1856, "mlp_forward": 704, "mlp_backward": 832},
}  # fmt: skip


@pytest.mark.parametrize("dim", SPILLS)
def test_the_kernels_fit_on_a_hopper_gpu(dim):
    for found in compile_for(90, [job(name, dim) for name in SPILLS[dim]]):
        name = found["kernel"]
        assert found["shared"] <= SHARED_LIMIT, name
        assert found["spills"] <= SPILLS[dim][name], f"{name}: {found['spills']} bytes of local memory per thread"


def test_the_kernels_compile_for_an_ampere_gpu():
    found = compile_for(80, [job(name, 64) for name in ("linear_forward", "mlp_forward")])
    assert not any(kernel["wgmma"] for kernel in found)
