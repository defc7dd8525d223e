"""Runs whose steps visit the core more or less often."""

from collections import Counter

import pytest
import torch
from training_cases import tiny_config

from fastweight import BlockConfig, FeedForwardConfig, Model, ModelConfig, load
from fastweight.mixers.attention import AttentionConfig
from fastweight.recipes import recipe
from fastweight.train import LoopConfig, ObjectiveConfig, TrainConfig, read_metrics, train
from fastweight.train.loops import LoopFollower, draw

ATTENTION = AttentionConfig(num_heads=2, qk_norm="head", norm="rms-unit", exclude_self=True)
BLOCK = BlockConfig(mixer=ATTENTION, feed_forward=FeedForwardConfig(kind="leaky-relu2", hidden=32), x0_mix=True)


def looped_model(loops=(1, 2, 3)) -> Model:
    torch.manual_seed(0)
    return Model(ModelConfig(vocab_size=257, d_model=16, blocks=(BLOCK,) * 3, loops=loops, skips="gated", smear=4))


def loops_of(out) -> list[int]:
    return [line["loops"] for line in read_metrics(out) if line["kind"] == "train"]


@pytest.mark.parametrize(("settings", "total"), [({}, 6), ({"sample_min": 1}, 8)])
def test_the_loops_of_every_step_are_followed(settings, total, store, tmp_path, monkeypatch):
    seen = []
    plain = Model.features

    def features(self, *args):
        if torch.is_grad_enabled():
            seen.append(self.visits.count(1))
        return plain(self, *args)

    monkeypatch.setattr(Model, "features", features)
    config = tiny_config(store, loops=LoopConfig(on_at=0.25, **settings))
    train(config, tmp_path, model=looped_model(), quiet=True)
    assert seen == loops_of(tmp_path)
    assert seen[:2] == [1, 1]
    if not settings:
        assert seen[2:] == [3] * 6
    else:
        assert seen[2:] == [1 + draw(0, step, 3) for step in range(2, 8)]


def test_a_run_leaves_the_model_with_its_own_loops(store, tmp_path):
    model = looped_model()
    train(tiny_config(store, loops=LoopConfig(sample_min=1)), tmp_path, model=model, quiet=True)
    assert model.visits == model.config.visits == load(tmp_path / "model").visits


def test_the_same_run_without_loop_settings_is_one_with_all_loops(store, tmp_path):
    train(tiny_config(store), tmp_path / "a", model=looped_model(), quiet=True)
    train(tiny_config(store, loops=LoopConfig(sample_min=3)), tmp_path / "b", model=looped_model(), quiet=True)
    a, b = (load(tmp_path / name / "model").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_draws_the_same_loops_and_ends_with_the_same_bits(store, tmp_path):
    config = tiny_config(store, loops=LoopConfig(sample_min=1, on_at=0.4), checkpoint_every=1, keep_checkpoints=9)
    train(config, tmp_path / "whole", model=looped_model(), quiet=True)
    want, loops = load(tmp_path / "whole" / "model").state_dict(), loops_of(tmp_path / "whole")
    for step in ("step-000002", "step-000005"):  # before and after the loops go on
        train(None, tmp_path / "whole", resume=step, quiet=True)
        got = load(tmp_path / "whole" / "model").state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert loops_of(tmp_path / "whole") == loops


def test_loops_are_drawn_evenly_and_differ_by_seed():
    counts = Counter(draw(7, step, 4) for step in range(4000))
    # 1000 each are expected, the deviation of a count is 27.
    assert all(abs(counts[i] - 1000) < 140 for i in range(4))
    assert [draw(7, step, 4) for step in range(20)] != [draw(8, step, 4) for step in range(20)]


def test_before_the_loops_are_on_the_core_is_measured_once():
    model = looped_model()
    follower = LoopFollower(model, LoopConfig(sample_min=2, on_at=0.5), 0)
    follower.settle(0.49)
    assert model.visits == (0, 1, 2)
    follower.set(3, 0.5)
    assert model.visits.count(1) in (2, 3)
    follower.settle(0.5)
    assert model.visits == (0, 1, 1, 1, 2)


def test_loops_of_a_model_that_has_none_are_refused(store, tmp_path):
    model = looped_model(loops=None)
    with pytest.raises(ValueError, match="this model has no loops"):
        train(tiny_config(store, loops=LoopConfig(on_at=0.5)), tmp_path, model=model, quiet=True)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoopConfig(sample_min=-1), "sample_min must not be negative"),
        (lambda: LoopConfig(on_at=1.5), r"must lie in \[0, 1\]"),
        (
            lambda: tiny_config("s", view="streams", carry_state=True, loops=LoopConfig(on_at=0.5)),
            "the same loops in every step",
        ),
        (
            lambda: tiny_config(
                "s", objective=ObjectiveConfig(kind="transfer"), trainable=("memory",), loops=LoopConfig(sample_min=1)
            ),
            "loops must stay the same",
        ),
    ],
)
def test_senseless_loops_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_loops_than_the_model_has_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="sample_min is 4, the model visits its core 3 times"):
        train(tiny_config(store, loops=LoopConfig(sample_min=4)), tmp_path, model=looped_model(), quiet=True)


@pytest.mark.parametrize("name", ["golf-baseline-9x512", "golf-record-11x512", "recurrent-3x8", "tiny-record"])
def test_recipes_survive_json_and_name_their_preset(name):
    config = recipe(name)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.model.preset == name
