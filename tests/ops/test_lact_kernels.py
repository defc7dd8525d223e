"""The Triton kernels of LaCT, run by the interpreter, against `naive`; and what they need of a GPU."""

import pytest
import torch
from interpreter import interpreted, needs_triton
from lact_problems import RULES, Problem
from tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = needs_triton


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    from fastweight.ops.lact import kernels_muon, kernels_pieces

    interpreted(kernels_muon, kernels_pieces)


@pytest.mark.parametrize("name", RULES)
def test_the_kernels_agree_with_naive_in_float64(name, poisoned_empty):
    length = 2 * CHUNK + 3
    exact, problem = Problem(RULES[name], length), Problem(RULES[name], length, dtype=torch.float32)
    want_y, want_state = exact.read(exact.init(2), backend="naive")
    got_y, got_state = problem.read(problem.init(2), backend="triton")
    factor = 100 if "muon" in name else 1  # Newton–Schulz has slope 493 at zero
    assert_close(got_y, want_y, factor * OUTPUT[torch.float32], "outputs")
    want = exact.gradients(want_y, want_state)
    for key, g in problem.gradients(got_y, got_state).items():
        assert_close(g, want[key], factor * GRADIENT[torch.float32], f"gradient of {key}")
