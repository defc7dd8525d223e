"""The configurations left to flash-linear-attention's kernels, on a pretended H100."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import SHARED_LIMIT
from interpreter import needs_triton

from fastweight.ops.delta import fla_tuning

pytestmark = [
    needs_triton,
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla-core is not installed"),
]
TESTS = Path(__file__).parents[1]
MOST = 14  # configurations on the way of one call with gradients
# Bytes of local memory per thread. These two hold more than registers can: no configuration of the package spills less.
SPILLS = {"chunk_kda_bwd_kernel_wy_dqkg_fused": 1600, "prepare_wy_repr_bwd_kernel": 700}


def pretended(*arguments):
    path = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, str(TESTS / "pretended_fla.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def choices():
    return pretended()


@pytest.mark.parametrize("op", list(fla_tuning.KERNELS))
def test_each_kernel_that_runs_keeps_a_few_of_the_packages_own_configurations(op, choices):
    full, left = choices["all"][op], choices["left"][op]
    assert set(left) == set(full) == {name.split(":")[1] for name in fla_tuning.KERNELS[op]}
    assert all(set() < set(left[name]) <= set(full[name]) for name in full)
    assert sum(map(len, left.values())) <= MOST < sum(map(len, full.values()))


@pytest.mark.parametrize("case", ["searching", "cached"])
def test_the_packages_own_search_can_be_had(case, choices):
    assert choices[case] == choices["all"]


def test_a_kernel_that_is_not_there_is_named(choices):
    (said,) = choices["said"]
    assert "does not have the configurations chosen for recompute_w_u_fwd_kda_kernel. Triton will time all" in said


def test_what_is_left_fits_into_an_sm_90():
    for op, found in pretended("128").items():
        assert len(found) == len(fla_tuning.KERNELS[op])
        for name, needs in found.items():
            assert needs, name
            assert all(n["shared"] <= SHARED_LIMIT and n["spills"] <= SPILLS.get(name, 128) for n in needs), (
                name,
                needs,
            )
