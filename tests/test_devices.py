"""The name of a device, on machines with and without a GPU."""

import pytest
import torch

from fastweight.devices import pick_device


def set_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("count", "kind"), [(0, "cpu"), (2, "cuda")])
def test_auto_is_a_gpu_if_there_is_one(monkeypatch, count, kind):
    set_gpus(monkeypatch, count)
    assert pick_device("auto") == torch.device(kind)


def test_gpus_are_counted_from_0(monkeypatch):
    set_gpus(monkeypatch, 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)


# torch keeps the number of a device in eight bits: it takes cuda:256 for cuda:0.
@pytest.mark.parametrize(
    ("count", "name"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (2, "cuda:256"), (2, "cuda:9999")]
)
def test_a_gpu_that_is_not_there_is_refused_with_their_number(monkeypatch, count, name):
    set_gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=rf"device '{name}' does not exist.*{count} CUDA GPU"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:-1", "cuda:x", ""])
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown device '{name}'"):
        pick_device(name)


def test_other_kinds_of_devices_are_refused():
    with pytest.raises(ValueError, match="device 'meta' is not supported"):
        pick_device("meta")
