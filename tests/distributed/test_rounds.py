"""Groups that train alone for a while are DiLoCo: the same weights as a plain loop of it, whoever dies or goes on."""

import contextlib
import shutil

import pytest
import torch
from distributed import runs
from distributed.rounds_cases import STREAMING, House, Plain, make_together, rounds_config
from distributed.test_equality import TOLERANCE
from tolerances import assert_close
from training_cases import attention_model, tiny_config, tiny_model

import fastweight
from fastweight.data import Store
from fastweight.diloco import DilocoConfig
from fastweight.diloco.simulate import World, simulate
from fastweight.distributed.mesh import ReplicaConfig
from fastweight.distributed.outer import Outer
from fastweight.distributed.team import Team
from fastweight.optim import AveragingConfig, ScheduleConfig
from fastweight.train import read_metrics, train
from fastweight.train.loop import Trainer
from fastweight.train.replicas import check_replicas
from fastweight.train.signals import StopRequest

MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}
NOT_AVERAGED = {"averaging": AveragingConfig()}
CASES = {
    "mean of every step": ("delta", {"every": 1, **MEAN}, {"steps": 5}),
    "one exchange, overlapped": ("delta", {"every": 4, "overlap_steps": 3}, {"steps": 8}),
    "streaming": ("delta", STREAMING, {"steps": 16}),
    "streaming of three parts": ("looped", {"every": 6, "fragments": 3, "outer_momentum": 0.5}, {"steps": 8}),
    "muon": ("muon", {"every": 4}, {"steps": 8, **NOT_AVERAGED}),
    "packed": ("packed", {"every": 4}, {"steps": 8, "seq_len": 64}),
}


def weights(folder):
    return fastweight.load(folder / "model").state_dict()


def folders(path):
    return [path / "one", path / "two"]


def assert_equal_groups(path):
    one, two = (weights(folder) for folder in folders(path))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def assert_plain(path, plain):
    assert_equal_groups(path)
    for name, tensor in weights(path / "one").items():
        assert_close(tensor, plain.weights[name], TOLERANCE, name)


def make_case(store, path, name, replicas, *, house=None, **changes):
    """The run `name` of two groups in two folders of `path`; returns its settings."""
    config = rounds_config(store, name, replicas, **changes)
    make_together(house or House(), config, runs.RUNS[name][0], folders(path))
    return config


@pytest.fixture(scope="module")
def diloco(store, tmp_path_factory):
    """Two groups that meet after every fourth of 16 steps, and their settings."""
    path = tmp_path_factory.mktemp("diloco")
    return path, make_case(store, path, "delta", {"every": 4}, steps=16, checkpoint_every=8)


def test_two_groups_learn_what_a_plain_loop_of_diloco_learns(diloco, store):
    path, config = diloco
    plain = Plain(store, config, "delta")
    assert_plain(path, plain)
    records = read_metrics(path / "one", "train")
    assert [record["loss_nats"] for record in records] == pytest.approx(plain.losses, rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_so_they_do_in_every_form_of_it(case, store, tmp_path):
    name, replicas, changes = CASES[case]
    config = make_case(store, tmp_path, name, replicas, **changes)
    assert_plain(tmp_path, Plain(store, config, name))


def test_groups_that_meet_after_every_step_are_synchronous_workers(store, tmp_path):
    """The workers of `fastweight diloco` take whole steps in turn where groups share each out: with one step between
    merges, twice the batch and one rate these are the same samples."""
    constant = ScheduleConfig(kind="linear", final_ratio=1.0)
    workers = tiny_config("x", steps=12, schedule=constant)
    data, world = Store.open(store), World(speeds=(1.0, 1.0))
    wanted = simulate(attention_model(), data, workers, DilocoConfig(lease_steps=1), world, measure=False).model
    replicas = rounds_config(store, "delta", {"every": 1}).replicas
    groups = tiny_config(store, steps=6, batch_size=2 * workers.data.batch_size, schedule=constant, replicas=replicas)
    make_together(House(), groups, attention_model, folders(tmp_path))
    for name, tensor in weights(tmp_path / "one").items():
        assert_close(tensor, wanted.get_parameter(name), 1e-6, name)


def test_a_round_that_does_not_count_is_made_again_from_its_begin(diloco, store, tmp_path):
    path, _ = diloco
    make_case(store, tmp_path, "delta", {"every": 4}, house=House(fails=2), steps=16, checkpoint_every=8)
    assert_equal_groups(tmp_path)
    for name, tensor in weights(path / "one").items():
        assert torch.equal(tensor, weights(tmp_path / "one")[name]), name
    mine, theirs = (read_metrics(folder / "one", "train") for folder in (tmp_path, path))
    for name in ("step", "tokens", "loss_nats", "grad_norm", "bad_steps"):
        assert [record[name] for record in mine] == [record[name] for record in theirs]
    (pause,) = read_metrics(tmp_path / "one", "restart")
    assert (pause["step"], pause["repeated_steps"]) == (8, 0)


def test_a_group_that_comes_back_takes_over_all_that_another_has(store, tmp_path):
    """Inner moments, the weights of the last exchange, outer momentum."""
    config = make_case(store, tmp_path, "delta", STREAMING, house=House(heals=2), steps=16)
    plain = Plain(store, config, "delta", heals=2)
    assert_plain(tmp_path, plain)


def test_groups_go_on_from_their_checkpoints_bit_by_bit(store, tmp_path):
    config = make_case(store, tmp_path, "delta", STREAMING, steps=16, checkpoint_every=8)
    before = weights(tmp_path / "one")
    make_together(House(), config, tiny_model, folders(tmp_path), resume="step-000008")
    assert_equal_groups(tmp_path)
    for name, tensor in weights(tmp_path / "one").items():
        assert torch.equal(tensor, before[name]), name


def test_metrics_say_what_groups_send_per_token_that_they_read(diloco):
    path, _ = diloco
    numbers = sum(tensor.numel() for tensor in weights(path / "one").values())
    records = read_metrics(path / "one", "train")
    assert [record["step"] for record in records] == [4, 8, 12, 16]
    assert [record["tokens"] for record in records] == [4 * 4 * 40 * n for n in range(1, 5)]  # steps × rows × tokens
    for record in records:
        assert record["groups"] == 2
        # Double precision, and below 200 bytes of counts; each of two groups reads half of the tokens.
        assert 0 <= record["sent_bytes_per_token"] * 4 * 2 * 40 - 8 * numbers < 200


def test_losses_of_further_tokens_are_those_of_all_groups(store, tmp_path):
    """Before the weights move apart, two groups see together what one process sees."""
    name = "ahead"
    make_case(store, tmp_path, name, {"every": 1}, steps=1, warmup_steps=1)
    alone = runs.run_config(store, name, steps=1, warmup_steps=1)
    train(alone, tmp_path / "alone", model=runs.RUNS[name][0](), quiet=True)
    (mine,), (theirs,) = (read_metrics(tmp_path / folder, "train") for folder in ("two", "alone"))
    for key in ("loss", "loss_nats", "bits_per_byte", "tokens"):
        assert mine[key] == pytest.approx(theirs[key], rel=TOLERANCE)
    assert mine.keys() - theirs.keys() == {"groups", "sent_bytes_per_token"}


def test_a_signal_waits_for_the_end_of_a_round(store, tmp_path, monkeypatch):
    """Else the others would have to make it again."""
    asked, step = StopRequest(), Trainer.step

    def run(self, batches):
        step(self, batches)
        asked.name = "SIGTERM" if self.tally.step >= 6 else ""

    monkeypatch.setattr(Trainer, "step", run)
    monkeypatch.setattr("fastweight.train.run.stop_requests", lambda: contextlib.nullcontext(asked))
    config = rounds_config(store, "delta", {"every": 4}, steps=16)
    results = make_together(House(), config, runs.RUNS["delta"][0], folders(tmp_path))
    assert [(result.step, result.stopped) for result in results] == [(8, "SIGTERM")] * 2


def test_other_settings_of_rounds_are_another_run(diloco, store, tmp_path):
    path, _ = diloco
    out = shutil.copytree(path / "one", tmp_path / "run")
    config = rounds_config(store, "delta", {"every": 8}, steps=16, checkpoint_every=8)
    with pytest.raises(ValueError, match="was started with other settings .*replicas: .*'every': 4.*'every': 8"):
        train(config, out, resume=True, quiet=True)


def test_a_checkpoint_without_the_weights_of_the_last_exchange_is_refused(store):
    outer = Outer(dict(tiny_model().named_parameters()), rounds_config(store, "delta", {"every": 4}).replicas)
    with pytest.raises(ValueError, match=r"outer weights: blocks.0.* missing"):
        outer.load_state_tensors({})


def test_more_fragments_than_there_are_parts_are_refused(store):
    settings = rounds_config(store, "delta", {"every": 40, "fragments": 40}).replicas
    with pytest.raises(ValueError, match="fragments 40 are more than this model has"):
        Outer(dict(tiny_model().named_parameters()), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "every must not be negative, got -1"),
        ({"fragments": 0, "every": 4}, "fragments must be at least 1, got 0"),
        ({"fragments": 2}, "fragments 2 belongs to groups that train alone"),
        ({"overlap_steps": 1}, "overlap_steps 1 belongs to groups that train alone"),
        ({"every": 5, "fragments": 2}, r"every \(5\) must be a multiple of fragments \(2\)"),
        (
            {"every": 4, "fragments": 2, "overlap_steps": 2},
            r"overlap_steps must be below every / fragments \(2\), got 2",
        ),
        ({"every": 4, "blend": 0.5}, "blend needs overlap_steps"),
        ({"every": 4, "overlap_steps": 1, "blend": 1.5}, r"blend must lie in \[0, 1\], got 1.5"),
        ({"every": 4, "outer_lr": 0.0}, "outer_lr must be positive, got 0.0"),
        ({"every": 4, "outer_momentum": 1.0}, r"outer_momentum must lie in \[0, 1\), got 1.0"),
        ({"every": 4, "most": 0}, "every belongs to groups. Set most"),
    ],
)
def test_settings_of_rounds_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReplicaConfig(**{"most": 2, "lighthouse": "http://localhost:1", **settings})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 10}, "a run of 10 steps does not end with a round of 4"),
        ({"averaging": AveragingConfig(kind="ema")}, "averaging.kind to none"),
    ],
)
def test_what_groups_that_train_alone_cannot_do_is_refused(changes, message):
    config = rounds_config("store", "delta", {"every": 4}, **{"steps": 8, **changes})
    with pytest.raises(ValueError, match=message):
        check_replicas(config, Team())
