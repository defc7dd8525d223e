"""One seed, one thread and one directory of imports for every test."""

import random

import numpy as np
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where the laws run: cpu, cuda")


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # tests run in parallel processes; threads inside them only compete
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # libraries under test may use the legacy generator
    random.seed(0)
