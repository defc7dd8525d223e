"""Groups that train alone for a while are DiLoCo: the same weights as a plain loop of it, whoever dies or goes on."""

import shutil

import pytest
import torch
from distributed import runs
from distributed.rounds_cases import House, Plain, make_together, rounds_config
from distributed.test_equality import TOLERANCE
from tolerances import assert_close

import fastweight
from fastweight.optim import AveragingConfig
from fastweight.train import read_metrics

NO_MOMENTUM = {"outer_lr": 1.0, "outer_momentum": 0.0}
STREAMING = {"every": 8, "fragments": 2, "overlap_steps": 1, "blend": 0.5}
CASES = {
    "diloco": ("delta", {"every": 4}, {}),
    "mean of every step": ("delta", {"every": 1, **NO_MOMENTUM}, {}),
    "one exchange": ("delta", {"every": 20}, {}),
    "overlapped": ("delta", {"every": 5, "overlap_steps": 2}, {}),
    "streaming": ("delta", STREAMING, {}),
    "looped": ("looped", {"every": 12, "fragments": 3, "outer_momentum": 0.5}, {"steps": 20}),
    "muon": ("muon", {"every": 4}, {"averaging": AveragingConfig()}),
    "packed": ("packed", {"every": 4}, {}),
    "ahead": ("ahead", {"every": 4}, {}),
}


def weights(folder):
    return fastweight.load(folder / "model").state_dict()


def assert_equal_groups(folder):
    one, two = weights(folder / "one"), weights(folder / "two")
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def assert_plain(folder, plain):
    assert_equal_groups(folder)
    for name, tensor in weights(folder / "one").items():
        assert_close(tensor, plain.weights[name], TOLERANCE, name)


@pytest.mark.parametrize("case", [name for name in CASES if name != "ahead"])
def test_two_groups_learn_what_a_plain_loop_of_diloco_learns(case, store, tmp_path):
    name, replicas, changes = CASES[case]
    config = rounds_config(store, name, replicas, **changes)
    make_together(House(), config, name, [tmp_path / "one", tmp_path / "two"])
    plain = Plain(store, config, name)
    assert_plain(tmp_path, plain)
    if replicas["every"] <= 5:
        records = read_metrics(tmp_path / "one", "train")
        assert [record["loss_nats"] for record in records] == pytest.approx(plain.losses, rel=TOLERANCE)
