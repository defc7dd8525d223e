"""Muon's matrices dealt out to ranks: everything is done once, evenly, and the result is that of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerances import OUTPUT, assert_close

from fastweight.optim.shares import deal, map_shared

SHAPES = [(5, 8, 3), (1, 16, 16), (3, 4, 20), (1, 2, 2)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_every_matrix_is_dealt_to_one_rank(ranks):
    dealt = [(bank, i) for share in deal(SHAPES, ranks) for bank, members in share.items() for i in members]
    assert sorted(dealt) == [(bank, i) for bank, (n, _, _) in enumerate(SHAPES) for i in range(n)]


def test_ranks_have_equal_work_where_it_can_be_divided():
    loads = [sum(len(members) for members in share.values()) for share in deal([(12, 4, 4)], 4)]
    assert loads == [3, 3, 3, 3]


def test_one_process_does_all_the_work_itself():
    banks = [torch.ones(2, 3, 3), torch.ones(1, 4, 2)]
    assert [bank.tolist() for bank in map_shared(lambda x: 2 * x, banks)] == [(2 * bank).tolist() for bank in banks]


STEPS = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from training_cases import tiny_model
from fastweight.optim import Optimizer, OptimizerConfig
torch.set_num_threads(1)
rank, world, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + out + "/meeting", rank=rank, world_size=world)
model = tiny_model()
optimizer = Optimizer(model, OptimizerConfig(name="muon", lr=0.05, normuon=True, muon_rows="equalised"))
for seed in range(3):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
save_file({{n: p.detach() for n, p in model.named_parameters()}}, f"{{out}}/{{world}}-{{rank}}.safetensors")
save_file(optimizer.state_tensors(), f"{{out}}/state-{{world}}-{{rank}}.safetensors")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Weights and optimiser state after three steps, alone and on two ranks, by file name."""
    out, code = tmp_path_factory.mktemp("ranks"), STEPS.format(tests=str(Path(__file__).parents[1]))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), str(out)], stderr=subprocess.PIPE, text=True
        )
        for world in (1, 2)
        for rank in range(world)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return {path.stem: load_file(path) for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["", "state-"])
def test_golf_p12_two_ranks_make_the_updates_of_one(runs, kind):
    # A product may sum in another order when its batch has other members: rounding, not bits.
    for name, want in runs[f"{kind}1-0"].items():
        assert_close(runs[f"{kind}2-0"][name], want, OUTPUT[torch.float32], name)


@pytest.mark.parametrize("kind", ["", "state-"])
def test_golf_p12_both_ranks_hold_the_same_bits(runs, kind):
    for name, want in runs[f"{kind}2-0"].items():
        assert torch.equal(runs[f"{kind}2-1"][name], want), name
