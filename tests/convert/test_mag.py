"""The weights of the memories: set, read, refused, and left out in the teacher's view."""

import pytest
import torch
from convert.liza_cases import T, backbone, face, ids, with_settings

from fastweight.convert.mag import backbone_view, find_model, mag_weights, set_mag_weight
from fastweight.convert.titanize import titanize


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_weights_are_set_for_a_model_a_face_and_whatever_wraps_them():
    model = titanize(backbone())
    for value, thing in ((0.25, model), (0.5, face(model)), (0.75, Wrapper(Wrapper(face(model))))):
        set_mag_weight(thing, value)
        assert mag_weights(thing) == {0: [value] * 4, 1: [value] * 4}


def test_weights_are_set_by_layer_and_by_head():
    model = titanize(backbone())
    set_mag_weight(model, (0.5,), layers=[1])
    assert mag_weights(model) == {0: [0.0] * 4, 1: [0.5] * 4}
    set_mag_weight(model, {0: [0.0, 0.25, 0.5, 1.0]})
    assert mag_weights(model)[0] == [0.0, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "layers", "message"),
    [
        (1.5, None, r"needs a number in \[0, 1\], or 4 of them \(one per head\), got 1.5"),
        (float("nan"), None, "got nan"),
        ([0.1, 0.2], None, "got \\[0.1, 0.2\\]"),
        ("0.5", None, "got '0.5'"),
        (0.5, [0], r"layer\(s\) \[0\] have no memory; those that do are \[1\]"),
        ({1: 0.5, 7: 0.5}, None, r"layer\(s\) \[7\] have no memory"),
        ({1: 0.5}, [1], "leave layers out"),
    ],
)
def test_a_weight_that_cannot_be_set_is_refused_and_nothing_changes(value, layers, message):
    model = titanize(backbone(), layers=[1])
    with pytest.raises(ValueError, match=message):
        set_mag_weight(model, value, layers)
    assert mag_weights(model) == {1: [0.0] * 4}


def test_a_model_without_memories_has_no_weights_to_set():
    with pytest.raises(ValueError, match="no liza layer"):
        set_mag_weight(backbone(), 0.5)
    with pytest.raises(ValueError, match="needs a Model or something around one, got Linear"):
        find_model(torch.nn.Linear(2, 2))


# The teacher's view


@with_settings
def test_the_view_reads_as_the_backbone_and_leaves_everything_as_it_was(settings):
    plain = backbone()
    model = titanize(plain, mag_weight=0.6, **settings)
    want, _ = model(ids(2, T))
    with backbone_view(model) as teacher:
        assert torch.equal(teacher(ids(2, T))[0], plain(ids(2, T))[0])
    assert torch.equal(model(ids(2, T))[0], want)
    assert mag_weights(model)[0] == [pytest.approx(0.6)] * 4


def test_states_of_the_view_and_of_the_model_do_not_mix():
    model = titanize(backbone(), mag_weight=0.6)
    _, own = model(ids(2, T))
    with backbone_view(model):
        with pytest.raises(ValueError, match="belongs to another model"):
            model(ids(2, T), own)
        _, foreign = model(ids(2, T))
    with pytest.raises(ValueError, match="belongs to another model"):
        model(ids(2, T), foreign)
