"""Kernels that are started again without Triton get what Triton would have given them."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from interpreter import needs_triton

from benchmarks.host import count
from fastweight.ops import launch
from fastweight.ops.examples import Shape, examples
from fastweight.ops.launch import shared_share

TESTS = Path(__file__).parents[1]


@needs_triton
def test_triton_is_asked_once_for_each_kind_of_call_and_always_where_addresses_are_not_aligned():
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run(
        [sys.executable, TESTS / "pretended_gpu.py"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(one["same"] for one in found)
    by_triton = [one["case"] for one in found if one["by_triton"]]
    # Numbers other than 1 and multiples of 16 need one kernel; how many rows there are is never asked.
    assert by_triton == ["first", "another dtype", "16 heads", "1 head", "not aligned", "not aligned, again"]


@needs_triton
@pytest.mark.parametrize(
    ("kind", "kernels", "launches"),
    # Three of torch's launches make a new state. The MLP's others fill its marks, gradients that nobody gave and rows
    # that no mini-batch writes with zeros, and sum those rows.
    [("TTT-Linear", 6, 3), ("TTT-MLP", 6, 22)],
)
def test_a_call_asks_no_more_of_the_host_than_is_written_down(kind, kernels, launches):
    (example,) = [e for name, e in examples(window=1, mini_batch=16, chunk=1).items() if name.startswith(kind)]
    found = count(example, Shape(2, 40, 2, 16))["forward+backward"]
    assert found["kernel"] == kernels
    assert found["torch launch"] <= launches


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "percent"),
    [
        (255, 256, 88_128, 39),  # the registers of one block are all there are: 89,152 bytes of 233,472
        (128, 256, 88_128, 77),  # two blocks
        (32, 64, 100, 16),  # 32 blocks, 1,124 bytes each
        (255, 256, 232_448, 100),
        (255, 512, 0, 1),  # one block, even where the sizes leave no room for it
    ],
)
def test_the_cache_gets_what_blocks_that_fit_do_not_use(registers, threads, shared, percent):
    assert shared_share(registers, threads, shared, 65_536, 233_472) == percent


@pytest.mark.parametrize("refused", [0, 1])
def test_a_driver_that_refuses_is_no_error(refused, monkeypatch):
    asked = []

    class Driver:
        def cuFuncSetAttribute(self, function, attribute, percent):  # the driver's name
            asked.append((function.value, attribute, percent))
            return refused

    about = SimpleNamespace(regs_per_multiprocessor=65_536, shared_memory_per_multiprocessor=233_472)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _device: about)
    monkeypatch.setattr(launch, "_driver", Driver)
    metadata = SimpleNamespace(num_warps=8, shared=88_128)
    kernel = SimpleNamespace(n_regs=255, metadata=metadata, function=1 << 40, name="walk")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        launch.leave_to_cache(kernel, 0)
    assert asked == [(1 << 40, 9, 39)]
    assert [str(w.message) for w in said] == ["the CUDA driver took no carveout of 39 % for walk: error 1."] * refused
