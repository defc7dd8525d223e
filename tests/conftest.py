"""One seed, one thread and one directory of imports for every test."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined: kernels run on the CPU


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the laws run: cpu, cuda")
    parser.addoption("--real", action="store_true", help="also run what needs published weights (fetches 93 MB once)")


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs published weights; runs with --real")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--real"):
        skip = pytest.mark.skip(reason="needs published weights; run with --real")
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # tests run in parallel processes; threads inside them only compete
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries under test may use the legacy generator
    random.seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and friends full of NaN: what a kernel does not write shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            t = _original(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        monkeypatch.setattr(torch, name, poisoned)
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *a, **k: torch.empty(*a, **{"dtype": self.dtype, "device": self.device, **k}),
    )
