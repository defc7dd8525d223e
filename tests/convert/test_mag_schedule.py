"""The weight of the memory over the steps of a training."""

import json
import math

import pytest
import torch

from fastweight import BlockConfig, Model, ModelConfig
from fastweight.convert.mag import follow_schedule, mag_weights
from fastweight.convert.mag_schedule import MagSchedule
from fastweight.convert.titanize import titanize
from fastweight.mixers.attention import AttentionConfig

K = 7


def test_p10_a_linear_schedule_follows_the_formula_and_reaches_its_end_exactly():
    schedule = MagSchedule(kind="linear", initial=0.1, final=0.7, steps=K)
    assert schedule.at(0) == 0.1
    assert [schedule.at(s) for s in range(K)] == [pytest.approx(0.1 + 0.6 * s / K, abs=1e-15) for s in range(K)]
    assert [schedule.at(s) for s in (K, K + 1, 10 * K)] == [0.7] * 3


def test_p10_a_cosine_schedule_follows_the_formula_and_reaches_its_end_exactly():
    schedule = MagSchedule(kind="cosine", initial=0.9, final=0.2, steps=K)
    want = [0.2 + 0.7 * math.cos(math.pi * s / (2 * K)) ** 2 for s in range(K)]  # 1 + cos 2a = 2 cos² a
    assert [schedule.at(s) for s in range(K)] == [pytest.approx(w, abs=1e-15) for w in want]
    assert schedule.at(0) == 0.9
    assert schedule.at(K) == schedule.at(K + 5) == 0.2


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("initial", "final"), [(0.01, 0.5), (1.0, 0.3)])
def test_p10_a_schedule_never_turns_back(kind, initial, final):
    schedule = MagSchedule(kind=kind, initial=initial, final=final, steps=1000)
    values = [schedule.at(s) for s in range(1200)]
    assert values == sorted(values, reverse=final < initial)
    assert values[0] == initial
    assert values[1000:] == [final] * 200


def test_p10_a_constant_schedule_has_its_final_value_from_the_first_step():
    assert {MagSchedule(kind="constant", final=0.4).at(s) for s in range(300)} == {0.4}


def test_p10_a_cyclic_schedule_gives_each_value_its_period():
    schedule = MagSchedule(kind="cyclic", values=(0.0, 0.5, 1.0), period=2)
    assert [schedule.at(s) for s in range(8)] == [0, 0, 0.5, 0.5, 1, 1, 0, 0]


def test_p10_the_numbers_of_the_published_example_may_come_as_tuples_of_one():
    assert MagSchedule(initial=(0.01,), final=(0.5,), steps=(100,)) == MagSchedule(initial=0.01, final=0.5, steps=100)


def test_p10_staggered_layers_start_one_after_the_other():
    schedule = MagSchedule(kind="linear", initial=0.0, final=1.0, steps=4, stagger=3)
    assert [[schedule.at(s, layer, 2) for s in (0, 3, 4, 7)] for layer in (0, 1)] == [[0, 0.75, 1, 1], [0, 0, 0.25, 1]]
    assert schedule.end(2) == 7


def test_p10_a_negative_stagger_starts_with_the_last_layer():
    forward, back = MagSchedule(stagger=5), MagSchedule(stagger=-5)
    assert [forward.at(9, i, 4) for i in range(4)] == [back.at(9, 3 - i, 4) for i in range(4)]


@pytest.mark.parametrize(
    "schedule", [MagSchedule(), MagSchedule(kind="cyclic", values=(0.1, 0.2), period=3, stagger=-2)]
)
def test_a_schedule_survives_json(schedule):
    assert MagSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_p10_a_model_follows_its_schedule_from_before_the_first_step():
    blocks = tuple(BlockConfig(mixer=AttentionConfig(num_heads=2)) for _ in range(4))
    torch.manual_seed(0)
    model = titanize(Model(ModelConfig(vocab_size=9, d_model=8, blocks=blocks)), layers=[1, 3])
    schedule = MagSchedule(initial=0.25, final=0.5, steps=2, stagger=1)
    seen = [follow_schedule(model, schedule, step) for step in range(4)]
    assert seen == [{1: 0.25, 3: 0.25}, {1: 0.375, 3: 0.25}, {1: 0.5, 3: 0.375}, {1: 0.5, 3: 0.5}]
    assert mag_weights(model) == {1: [0.5, 0.5], 3: [0.5, 0.5]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cosin"}, "Did you mean cosine"),
        ({"initial": -0.1}, r"initial must be in \[0, 1\], got -0.1"),
        ({"final": 1.1}, r"final must be in \[0, 1\], got 1.1"),
        ({"final": math.nan}, r"final must be in \[0, 1\], got nan"),
        ({"final": "0.5"}, "final must be float, got str"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2.5}, "steps must be int"),
        ({"kind": "cyclic"}, "needs values"),
        ({"values": (0.1,)}, 'kind "cyclic", and no other'),
        ({"kind": "cyclic", "values": (0.1, 2.0)}, r"values must be in \[0, 1\], got 2.0"),
        ({"kind": "cyclic", "values": (0.1,), "period": 0}, "period must be at least 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MagSchedule(**settings)


def test_steps_and_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="step must not be negative"):
        MagSchedule().at(-1)
    with pytest.raises(ValueError, match="layer 2 is not one of 2 layers"):
        MagSchedule().at(0, 2, 2)
