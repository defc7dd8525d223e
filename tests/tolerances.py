"""The tolerances of all tests, as relative RMS errors, and the way they are measured."""

import torch
from torch import Tensor

OUTPUT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3}
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS(got - want) / RMS(want); absolute where want is zero."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    assert got.isfinite().all(), "the result is not finite"
    scale = want.square().mean().sqrt().item() if want.numel() else 0.0
    error = (got - want).square().mean().sqrt().item() if want.numel() else 0.0
    return error / scale if scale > 1e-12 else error


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str = "result") -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"{what}: relative RMS error {error:.3g} exceeds {tolerance:.3g}"


def assert_trees_close(got, want, tolerance: float) -> None:
    """Two states agree, tensor by tensor; integers exactly."""
    from fastweight.state import tensors

    got, want = dict(tensors(got)), dict(tensors(want))
    assert list(got) == list(want)
    for name, value in want.items():
        if value.is_floating_point():
            assert_close(got[name], value, tolerance, name)
        else:
            assert torch.equal(got[name], value), name
