"""Whole models: what calibration sees, every kind of layer, fitting under a cap, and what GPTQ is worth."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as multiprocessing
from artifact.trained import calibration, divergence, train_model
from laws.cases import CASES
from ports import free_port
from safetensors.torch import load_file, save_file
from tolerances import assert_close

from fastweight.artifact import (
    CapError,
    GroupSpec,
    LowRankSpec,
    PackSpec,
    collect_hessians,
    describe,
    fake_quantise,
    fake_quantised,
    fit_to_size,
    pack,
    tensor_groups,
    unpack,
)
from fastweight.artifact.gptq import output_error
from fastweight.artifact.quantise import Matrix, make_solvers, quantise
from fastweight.data import Batch
from fastweight.layers import FeedForwardConfig, InPlaceConfig
from fastweight.mixers import mixer_kinds
from fastweight.mixers.attention import AttentionConfig
from fastweight.mixers.delta import DeltaConfig
from fastweight.model import BlockConfig, Model, ModelConfig

# One case of every kind of mixer, and those with other parameters than the first.
KINDS = ("attention-grouped", "delta-gated", "lact-momentum", "lact-dense", "liza-learned", "liza-hedgehog",
         "ttt_linear-mamba", "ttt_mlp-transformer_mlp", "in-place")  # fmt: skip


def make_model(mixer=None, order=(0, 1, 1), tie=True, memory=None) -> Model:
    torch.manual_seed(0)
    feed_forward = FeedForwardConfig(hidden=24, memory=memory)
    block = BlockConfig(mixer=mixer or AttentionConfig(num_heads=2), feed_forward=feed_forward)
    config = ModelConfig(
        vocab_size=31, d_model=16, blocks=(block,) * (1 + max(order)), order=order, tie_embeddings=tie, init_std=0.3
    )
    return Model(config)


def tokens(seed: int = 0, rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 31, (rows, 50), generator=torch.Generator().manual_seed(seed))


def inputs_of(model: Model, name: str, batch: torch.Tensor) -> list[torch.Tensor]:
    """What a layer reads at each of its visits, taken down by wrapping its forward."""
    layer, seen = model.get_submodule(name), []
    forward = layer.forward
    layer.forward = lambda x: (seen.append(x), forward(x))[1]
    with torch.no_grad():
        model(batch)
    del layer.forward
    return [x.flatten(0, -2).double() for x in seen]


@pytest.mark.parametrize("name", ["blocks.1.feed_forward.down", "blocks.1.mixer.out", "blocks.0.mixer.qkv"])
def test_golf_p10_a_hessian_adds_up_all_visits_of_its_block(name):
    model = make_model()
    found = collect_hessians(model, [tokens(0), tokens(1)])[f"{name}.weight"]
    visits = [x for seed in (0, 1) for x in inputs_of(model, name, tokens(seed))]
    assert len(visits) == (4 if name.startswith("blocks.1") else 2)
    assert_close(found, sum(x.t() @ x for x in visits), 1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_reads_the_output_of_the_last_norm(tie):
    model = make_model(tie=tie)
    with torch.no_grad():
        features = model.features(tokens())[0].flatten(0, 1).double()
    found = collect_hessians(model, [tokens()])
    assert_close(found["embedding.weight" if tie else "head.weight"], features.t() @ features, 1e-5)
    assert ("embedding.weight" in found) == tie


def test_batches_of_the_loader_are_read_with_their_document_bounds():
    model, row = make_model(), tokens(rows=1)
    bounds = torch.tensor([0, 20, 50], dtype=torch.int32)
    batch = Batch(tokens=row, targets=row, target_bytes=row, cu_seqlens=bounds)
    alone = [collect_hessians(model, [part]) for part in (row[:, :20], row[:, 20:])]
    for name, found in collect_hessians(model, [batch]).items():
        assert_close(found, alone[0][name] + alone[1][name], 1e-5, name)


def test_calibration_leaves_the_model_as_it_was():
    model = make_model().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    collect_hessians(model, [tokens()])
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_a_hessian_that_overflows_is_refused_by_name():
    model = make_model()
    model.blocks[1].feed_forward.up.weight.data[:] = 1e30
    with pytest.raises(ValueError, match=r"Hessians of .*blocks\.1\.feed_forward\.down\.weight.* are not finite"):
        collect_hessians(model, [tokens()])


def test_no_batch_is_refused():
    with pytest.raises(ValueError, match="there is no batch"):
        collect_hessians(make_model(), [])


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batches = [tokens(0), tokens(1)] if rank == 0 else [tokens(2)]
    found = collect_hessians(make_model(), batches)
    save_file(found, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_golf_p10_two_ranks_with_different_numbers_of_batches_get_the_sum(tmp_path):
    multiprocessing.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    wanted = collect_hessians(make_model(), [tokens(i) for i in range(3)])
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, value in wanted.items():
            assert_close(found[name], value, 1e-6, name)


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_layer_can_be_calibrated_packed_and_read_back(case):
    memory = InPlaceConfig(chunk_size=8) if case == "in-place" else None
    model = make_model(CASES.get(case), order=(0, 0), memory=memory)
    spec, hessians = PackSpec(), collect_hessians(model, [tokens()])
    quantised = quantise(model, spec, make_solvers(spec, hessians))
    again = unpack(pack(model, spec, hessians=hessians))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, quantised[name].value()), name
    assert torch.isfinite(again(tokens())[0]).all()


def test_a_layer_that_calibration_never_called_is_rounded_and_says_so():
    model = make_model(CASES["liza-window"], order=(0,))
    methods = {
        t.name: t.method
        for t in describe(pack(model, PackSpec(), hessians=collect_hessians(model, [tokens()]))).tensors
    }
    assert methods["blocks.0.mixer.memory.beta.weight"] == "nearest"
    assert methods["blocks.0.mixer.qkv.weight"] == "gptq"


def test_groups_follow_the_kind_of_module():
    mixer = DeltaConfig(num_heads=1, head_dim=8, gated=True, conv_width=2)
    groups = tensor_groups(make_model(mixer, order=(0,), tie=False))
    wanted = {
        "embedding.weight": "embedding", "head.weight": "embedding", "norm.weight": "rest",
        "blocks.0.mixer.qkv.weight": "attention", "blocks.0.mixer.out.weight": "attention",
        "blocks.0.mixer.beta.weight": "gates", "blocks.0.mixer.decay.weight": "gates",
        "blocks.0.mixer.decay.bias": "rest", "blocks.0.mixer.conv.weight": "rest",
        "blocks.0.feed_forward.down.weight": "mlp",
    }  # fmt: skip
    assert {name: groups[name] for name in wanted} == wanted


def test_every_group_has_its_own_width():
    spec = PackSpec(method="nearest", attention=GroupSpec(bits=4, clip=3.0), mlp=GroupSpec(bits=8, clip=9.0))
    bits = {t.name: t.bits for t in describe(pack(make_model(), spec)).tensors}
    assert bits["blocks.0.mixer.qkv.weight"] == 4
    assert bits["blocks.0.feed_forward.up.weight"] == 8
    assert bits["embedding.weight"] == 7
    assert bits["norm.weight"] == 0


@pytest.fixture(scope="session")
def trained():
    model = train_model()
    return model, collect_hessians(model, calibration())


def test_golf_p10_the_file_shrinks_as_k_grows(trained):
    model, hessians = trained
    specs = [PackSpec(attention=g, mlp=g, embedding=g) for g in (GroupSpec(bits=6, clip=k) for k in (4, 6, 9, 13, 20))]
    sizes = [len(pack(model, spec, hessians=hessians)) for spec in specs]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("cap", [40_000, 33_333])
def test_a_fitted_file_is_under_the_cap_and_close_to_it(trained, cap):
    model, hessians = trained
    fitted = fit_to_size(model, cap + 5000, PackSpec(), hessians=hessians, program_bytes=5000, tolerance=0.003)
    assert 0.997 * cap <= len(fitted.data) <= cap
    assert pack(model, fitted.spec, hessians=hessians) == fitted.data
    assert len(fitted.tried) <= 12


def test_a_roomy_cap_ends_at_the_finest_clips(trained):
    model, hessians = trained
    fitted = fit_to_size(model, 10**9, PackSpec(), hessians=hessians)
    assert {fitted.spec.group(name).clip for name in ("attention", "mlp", "embedding")} == {4.0}


def test_clips_of_no_group_can_meet_no_cap(trained):
    model, hessians = trained
    with pytest.raises(ValueError, match="groups is empty; name those whose clips may move, of attention, mlp"):
        fit_to_size(model, 30_000, PackSpec(), hessians=hessians, groups=())


def test_a_cap_that_cannot_be_met_says_by_how_much_and_names_the_largest_tensors(trained):
    model, hessians = trained
    with pytest.raises(CapError, match=r"the cap of 9,000 bytes cannot be met: .* [\d,]+ too many.*feed_forward\.down"):
        fit_to_size(model, 9000, PackSpec(), hessians=hessians)


@pytest.mark.parametrize("cap", [38_000, 31_000])
def test_golf_p10_at_equal_bytes_gptq_loses_less_than_half_of_what_rounding_loses(trained, cap):
    model, hessians = trained
    lost = {}
    for method in ("gptq", "nearest"):
        fitted = fit_to_size(model, cap, PackSpec(method=method), hessians=hessians, tolerance=0.005)
        lost[method] = divergence(model, unpack(fitted.data))
    assert lost["gptq"] < 0.5 * lost["nearest"]


def test_a_low_rank_correction_brings_a_rounded_model_closer(trained):
    model, _ = trained
    coarse = GroupSpec(bits=4, clip=6.0)
    plain = PackSpec(method="nearest", attention=coarse, mlp=coarse)
    corrected = dataclasses.replace(plain, low_rank=LowRankSpec(rank=8, tensors=8))
    lost = [divergence(model, unpack(pack(model, spec))) for spec in (plain, corrected)]
    assert lost[1] < 0.9 * lost[0]


def test_a_low_rank_correction_after_gptq_lowers_the_error_of_every_output_it_corrects(trained):
    model, hessians = trained
    spec = PackSpec(low_rank=LowRankSpec(rank=8, tensors=3))
    solvers = make_solvers(spec, hessians)
    weights, corrected = model.state_dict(), 0
    for name, stored in quantise(model, spec, solvers).items():
        if isinstance(stored, Matrix) and stored.correction is not None:
            errors = [weights[name] - found.value() for found in (stored._replace(correction=None), stored)]
            before, after = (output_error(error, solvers[name]) for error in errors)
            assert after < 0.95 * before
            corrected += 1
    assert corrected == 3


def test_every_registered_kind_of_mixer_is_among_the_kinds():
    assert {CASES[case].kind for case in KINDS if case in CASES} == set(mixer_kinds())


@pytest.mark.parametrize("mode", ["round", "noise"])
def test_fake_quantisation_lets_the_gradient_pass(mode):
    weight = torch.randn(5, 40, requires_grad=True)
    direction = torch.randn(5, 40)
    (fake_quantise(weight, GroupSpec(bits=5, clip=4.0), mode) * direction).sum().backward()
    assert torch.equal(weight.grad, direction)


def test_fake_quantised_weights_are_those_that_are_read_back():
    model, spec = make_model(), PackSpec(method="nearest", embedding=GroupSpec(bits=8, clip=4.0))
    again = unpack(pack(model, PackSpec(method="nearest", rest="float32")))
    with fake_quantised(model, spec, blocks=(0, 1)):
        model.embedding.weight.data.copy_(again.embedding.weight)
        found = model(tokens())[0]
    assert torch.equal(found, again(tokens())[0])


def test_noise_stays_within_half_a_step():
    weight, settings = torch.randn(6, 500), GroupSpec(bits=5, clip=4.0)
    change = fake_quantise(weight, settings, "noise") - weight
    steps = 4.0 * weight.std(1, correction=0) / settings.qmax
    assert (change.abs().amax(1) <= 0.501 * steps).all()
    assert (change.abs().amax(1) > 0.45 * steps).all()


def test_fake_quantisation_reaches_looped_blocks_only_and_ends():
    model = make_model()
    plain, names = model(tokens())[0], list(model.state_dict())
    seen = {}
    for i in (0, 1):
        layer = model.blocks[i].feed_forward.up
        layer.register_forward_hook(lambda part, _, __, i=i: seen.update({i: "weight" in part.__dict__}))
    with fake_quantised(model, PackSpec()):
        changed = model(tokens())[0]
        assert list(model.state_dict()) == names
    assert seen == {0: False, 1: True}
    assert not torch.equal(changed, plain)
    assert torch.equal(model(tokens())[0], plain)


def test_fake_quantised_refuses_a_block_that_does_not_exist():
    with (
        pytest.raises(ValueError, match=r"block\(s\) \[7\] do not exist"),
        fake_quantised(make_model(), PackSpec(), blocks=[7]),
    ):
        pass


def test_importing_the_artifacts_needs_no_coder():
    code = "import sys; import fastweight.artifact; print([m for m in ('brotli', 'zstandard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
