"""How exact a backend is on this machine: measured, kept, said; and a wrong backend shows."""

import json

import pytest
import torch

from fastweight import BlockConfig, Model, ModelConfig, accuracy
from fastweight.backends import describe_backends
from fastweight.mixers.liza import LizaConfig
from fastweight.ops import dispatch
from fastweight.ops.delta.chunked import chunked

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastweight" / "accuracy.json"


def test_every_op_is_measured_and_within_the_rounding_of_its_tokens():
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        found = accuracy.measure(CPU, dtype)
        assert sorted(found) == dispatch.ops()
        for by in found.values():
            assert list(by) == ["chunked"]
            assert 0 < by["chunked"].output < limit
            assert 0 < by["chunked"].gradient < limit


def test_a_backend_that_is_a_little_wrong_is_seen(monkeypatch):
    def wrong(*args, **kwargs):
        y, memory = chunked(*args, **kwargs)
        return y * 1.01, memory

    monkeypatch.setitem(
        dispatch._OPS["delta_rule"], "chunked", dispatch.Implementation(wrong, lambda *args, **kwargs: None)
    )
    found = accuracy.measure(CPU, torch.float32)["delta_rule"]["chunked"]
    assert found.output == pytest.approx(0.01, rel=1e-3)


def test_what_was_measured_is_said_when_a_model_runs(cache):
    model = Model.from_preset("tiny-delta")
    assert "see fastweight doctor --measure" in describe_backends(model)["delta_rule"]
    one = {"delta_rule": {"chunked": accuracy.Accuracy(3e-7, 4e-7, "2026-01-31")}}
    assert accuracy.remember(CPU, torch.float32, one) == cache
    said = "3e-07 from the definition, gradients 4e-07, measured 2026-01-31"
    assert describe_backends(model)["delta_rule"].endswith(said)
    assert said not in describe_backends(model, torch.bfloat16)["delta_rule"]
    assert accuracy.recall(CPU, torch.float32) == one


def test_a_layer_of_two_ops_says_what_runs_when_only_one_of_them_has_the_backend_named(monkeypatch):
    config = ModelConfig(vocab_size=8, d_model=16, blocks=(BlockConfig(mixer=LizaConfig(num_heads=2)),))
    monkeypatch.setitem(
        dispatch._OPS["delta_rule"], "fla", dispatch.Implementation(chunked, lambda *args, **kwargs: None)
    )
    found = describe_backends(Model(config).set_backend("fla"))
    assert found["delta_rule"].startswith("fla (asked for)")
    assert found["attention"].startswith("chunked (flex needs CUDA tensors")


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": {"b": {"c": {"output": 1}}}}', "{"])
def test_a_damaged_cache_is_as_good_as_none(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert accuracy.recall(CPU, torch.float32) == {}
    accuracy.remember(CPU, torch.float32, {})
    assert list(json.loads(cache.read_text()).values()) == [{}]
