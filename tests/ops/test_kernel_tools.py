"""The tools that kernels are tested with find what they are meant to find."""

import pytest
import torch
from ahead_of_time import SHARED_LIMIT, compile_for
from interpreter import interpreted, needs_triton, within_arguments

from fastweight.ops.kernels import why_no_kernels

POINTERS = dict.fromkeys("abc", "*fp16")


@needs_triton
def test_a_kernel_with_a_loop_over_a_tensor_runs_on_the_cpu(poisoned_empty):
    import demo_kernel

    interpreted(demo_kernel)
    a, b = torch.randn(2, 3, 16, 16)
    c = torch.empty(16, 16)
    assert c.isnan().all()
    demo_kernel.product[(1,)](a, b, c, torch.tensor([3]), N=16)
    torch.testing.assert_close(c, (a @ b).sum(0))


@needs_triton
def test_a_kernel_that_reads_beyond_its_arguments_is_found_out():
    import demo_kernel

    interpreted(demo_kernel)
    a, c = torch.randn(3, 16, 16), torch.empty(16, 16)
    with within_arguments():
        demo_kernel.product[(1,)](a, a, c, torch.tensor([3]), N=16)
        with pytest.raises(Exception, match="256 of 256 addresses belong to none of the arguments"):
            demo_kernel.product[(1,)](a, a[:1].clone(), c, torch.tensor([2]), N=16)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_compiles_without_a_gpu_and_tells_what_it_needs(arch):
    signature = {**POINTERS, "n": "*i32", "N": "constexpr"}
    sizes = [
        {"kernel": "demo_kernel:product", "signature": signature, "constants": {"N": n}, "num_warps": w}
        for n, w in ((64, 4), (128, 1))
    ]
    small, large = compile_for(arch, sizes)
    assert 0 < small["shared"] < large["shared"] <= SHARED_LIMIT + 64 * 1024
    assert small["spills"] == 0
    assert large["spills"] > 0  # 128 × 128 sums in the registers of one warp cannot fit
    assert small["wgmma"] == (arch == 90)


@needs_triton
def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(AssertionError, match="arange"):
        compile_for(90, [{"kernel": "demo_kernel:product", "signature": {**POINTERS, "n": "*i32", "N": "constexpr"},
                          "constants": {"N": 63}}])  # fmt: skip


def test_what_kernels_cannot_run_is_refused_in_words(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert 'got cpu. Use backend="chunked", or move the model' in str(why_no_kernels(torch.zeros(1)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastweight.ops.kernels.HAS_TRITON", False)
    assert "pip install triton" in str(why_no_kernels(torch.zeros(1)))
    monkeypatch.setattr("fastweight.ops.kernels.HAS_TRITON", True)
    assert "got torch.float64" in str(why_no_kernels(torch.zeros(1, dtype=torch.float64)))
    assert why_no_kernels(torch.zeros(1)) is None
