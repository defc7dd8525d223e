"""Rounding: steps, GPTQ against a slow and independent one, and what the corrections are worth."""

import math

import pytest
import torch
from torch import Tensor

from fastweight.artifact.gptq import gptq, make_solver, output_error
from fastweight.artifact.low_rank import correct
from fastweight.artifact.rows import Rows, dequantise, nearest, row_scales
from fastweight.artifact.spec import GroupSpec, LowRankSpec, PackSpec


def pink_hessian(columns: int, seed: int = 0) -> Tensor:
    """Eigenvalues 1/i in a random basis: strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    return basis @ torch.diag(1 / torch.arange(1, columns + 1, dtype=torch.float64)) @ basis.t()


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def solver_of(hessian: Tensor, act_order: bool = True):
    return make_solver("w", hessian, damping=0.01, act_order=act_order)


def slow_gptq(weight: Tensor, hessian: Tensor, scales: Tensor, qmax: int, act_order: bool) -> Tensor:
    """Optimal Brain Quantisation with a given order: after each column the inverse of what remains is made anew."""
    h, w = hessian.double().clone(), weight.double().clone()
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j], w[:, j] = 1, 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else list(range(len(h)))
    codes = torch.zeros_like(w)
    for place, j in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, j] = (w[:, j] / scales.double()).round().clamp(-qmax, qmax)
        error = (w[:, j] - codes[:, j] * scales.double()) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0][None]
    return codes


def direct_error(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> float:
    error = weight.double() - dequantise(Rows(codes, scales)).double()
    return float(((error @ hessian) * error).sum())


@pytest.mark.parametrize("act_order", [True, False])
def test_golf_p10_gptq_equals_a_slow_one_that_inverts_what_remains_after_every_column(act_order):
    weight, hessian = weight_of(7, 150), pink_hessian(150)  # more columns than one block
    hessian[3], hessian[:, 3] = 0, 0
    scales = row_scales(weight, 6.4, 15)
    found = gptq(weight, solver_of(hessian, act_order), scales, 15)
    assert torch.equal(found.double(), slow_gptq(weight, hessian, scales, 15, act_order))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_golf_p10_with_uncorrelated_inputs_gptq_is_rounding_to_nearest(bits):
    qmax = (1 << (bits - 1)) - 1
    weight = weight_of(33, 257, torch.float32)
    scales = row_scales(weight, 8.0, qmax)
    found = gptq(weight, solver_of(torch.eye(257)), scales, qmax)
    assert torch.equal(found, nearest(weight, scales, qmax))


def test_golf_p10_gptq_halves_the_error_of_rounding_on_a_1_over_f_spectrum():
    weight, hessian = weight_of(256, 512, torch.float32), pink_hessian(512)
    scales = row_scales(weight, 12.85, 31)
    plain = direct_error(weight, nearest(weight, scales, 31), scales, hessian)
    found = direct_error(weight, gptq(weight, solver_of(hessian), scales, 31), scales, hessian)
    assert found * 1.5 <= plain


@pytest.mark.parametrize(("bits", "clip"), [(4, 3.2), (5, 6.4), (6, 12.85), (8, 20.0)])
def test_golf_p10_gptq_is_never_worse_than_rounding(bits, clip):
    weight, qmax = weight_of(64, 100), (1 << (bits - 1)) - 1
    scales = row_scales(weight, clip, qmax)
    for seed in range(3):
        hessian = pink_hessian(100, seed)
        found = direct_error(weight, gptq(weight, solver_of(hessian), scales, qmax), scales, hessian)
        assert found <= direct_error(weight, nearest(weight, scales, qmax), scales, hessian)


def test_golf_p10_the_order_of_the_inputs_does_not_matter_with_act_order():
    weight, hessian = weight_of(9, 200), pink_hessian(200)
    hessian.diagonal().add_(torch.linspace(0, 0.01, 200))  # no two inputs are equally active
    permutation = torch.randperm(200)
    scales = row_scales(weight, 12.85, 31)
    found = gptq(weight[:, permutation], solver_of(hessian[permutation][:, permutation]), scales, 31)
    assert torch.equal(found, gptq(weight, solver_of(hessian), scales, 31)[:, permutation])


def test_without_act_order_the_order_of_the_inputs_does_matter():
    weight, hessian, permutation = weight_of(9, 200), pink_hessian(200), torch.randperm(200)
    scales = row_scales(weight, 12.85, 31)
    moved = solver_of(hessian[permutation][:, permutation], act_order=False)
    found = gptq(weight[:, permutation], moved, scales, 31)
    assert not torch.equal(found, gptq(weight, solver_of(hessian, act_order=False), scales, 31)[:, permutation])


def test_golf_p10_an_input_that_never_fires_gets_code_0_and_moves_nothing():
    weight, hessian = weight_of(9, 40), pink_hessian(40)
    hessian[5], hessian[:, 5] = 0, 0
    scales = row_scales(weight, 12.85, 31)
    found = gptq(weight, solver_of(hessian), scales, 31)
    weight[:, 5] = 1000
    again = gptq(weight, solver_of(hessian), scales, 31)
    assert not found[:, 5].any()
    assert torch.equal(found, again)


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_golf_p10_codes_reach_qmax_and_never_go_beyond(bits):
    weight, qmax = 30 * weight_of(16, 300), (1 << (bits - 1)) - 1
    scales = row_scales(weight, 1.0, qmax)
    for codes in (nearest(weight, scales, qmax), gptq(weight, solver_of(pink_hessian(300)), scales, qmax)):
        assert (int(codes.min()), int(codes.max())) == (-qmax, qmax)


def test_golf_p10_the_step_is_k_deviations_over_qmax_rounded_to_float16_before_use():
    weight = weight_of(5, 300)
    scales = row_scales(weight, 12.85, 31)
    wanted = [torch.tensor(12.85 * row.std(correction=0).item() / 31).half() for row in weight]
    assert scales.dtype == torch.float16
    assert scales.tolist() == [w.item() for w in wanted]
    # A value 0.499 rounded steps away is code 0, though in unrounded steps it might be 0.5.
    edge = (scales.double() * 0.4999)[:, None]
    assert not nearest(edge, scales, 31).any()
    assert nearest((scales.double() * 0.5001)[:, None], scales, 31).all()


def test_rows_without_spread_keep_their_value_and_rows_of_zeros_stay_zero():
    weight = torch.tensor([[0.25, 0.25, 0.25], [0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])
    scales = row_scales(weight, 4.0, 31)
    found = dequantise(Rows(nearest(weight, scales, 31), scales))
    assert torch.allclose(found[0], weight[0], rtol=1e-3)
    assert not found[1].any()


def test_a_step_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="does not fit float16"):
        row_scales(1e6 * weight_of(2, 50), 12.85, 31)


@pytest.mark.parametrize(("bits", "clip"), [(6, 12.85), (8, 20.0), (7, 15.0), (5, 6.4)])
def test_golf_p10_the_entropy_is_log2_of_qmax_over_k_plus_2_05_bits(bits, clip):
    qmax = (1 << (bits - 1)) - 1
    weight = weight_of(512, 1024, torch.float32)
    counts = torch.bincount(nearest(weight, row_scales(weight, clip, qmax), qmax).flatten().int() + qmax).double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    assert entropy == pytest.approx(math.log2(qmax / clip) + 2.05, rel=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused_by_name(bad):
    hessian = pink_hessian(20)
    hessian[2, 3] = bad
    with pytest.raises(ValueError, match=r"blocks\.1\.x\.weight: 1 of the 400 entries of its Hessian are not finite"):
        make_solver("blocks.1.x.weight", hessian, damping=0.01, act_order=True)


def test_the_error_of_the_outputs_is_the_trace_of_error_hessian_error():
    error, hessian = weight_of(6, 30), pink_hessian(30)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(30)
    assert output_error(error, solver_of(hessian)) == pytest.approx(float(((error @ damped) * error).sum()))


@pytest.mark.parametrize("with_hessian", [True, False])
def test_a_low_rank_correction_takes_off_the_largest_part_of_the_error(with_hessian):
    generator = torch.Generator().manual_seed(2)
    outer = torch.randn(60, 2, generator=generator) @ torch.randn(2, 90, generator=generator)
    weight = weight_of(60, 90, torch.float32) * 0.01 + outer
    zero = Rows(torch.zeros(60, 90, dtype=torch.int8), torch.ones(60).half())
    solvers = {"w": solver_of(pink_hessian(90))} if with_hessian else {}
    found = correct({"w": (weight, zero)}, solvers, LowRankSpec(rank=2, tensors=1, bits=8))["w"]
    left = weight - found.added_to(torch.zeros(60, 90))
    before, after = weight.double(), left.double()
    if with_hessian:
        assert output_error(after, solvers["w"]) < 0.01 * output_error(before, solvers["w"])
    else:
        assert after.norm() < 0.02 * before.norm()


def test_only_the_matrices_with_the_largest_errors_are_corrected():
    rows = Rows(torch.zeros(8, 9, dtype=torch.int8), torch.ones(8).half())
    matrices = {name: (size * weight_of(8, 9, torch.float32), rows) for name, size in (("a", 1), ("b", 3), ("c", 2))}
    assert set(correct(matrices, {}, LowRankSpec(rank=1, tensors=2))) == {"b", "c"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupSpec(bits=3, clip=4.0), r"bits must lie in 4\.\.8, got 3"),
        (lambda: GroupSpec(bits=6, clip=0.0), "clip must be positive and finite"),
        (lambda: PackSpec(method="gptp"), "unknown method 'gptp'. Did you mean gptq"),
        (lambda: PackSpec(damping=0.0), "damping must be positive"),
        (lambda: LowRankSpec(rank=0), "rank must be at least 1"),
        (lambda: LowRankSpec(bits=9), r"bits must lie in 2\.\.8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
