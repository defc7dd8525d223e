"""The page of benchmarks says what the measured files hold, and the least work of an op is counted right."""

import time

import pytest
import torch

from benchmarks import ops, tune_flex
from benchmarks.ahead import side_by_side
from benchmarks.costs import cost
from benchmarks.document import TARGET, page
from benchmarks.ops import draw, works
from benchmarks.tune_flex import candidates, try_all
from fastweight.ops.attention import flex
from fastweight.ops.attention.sight import BLOCK
from fastweight.ops.examples import Shape, examples

SIZES = {"window": 4, "mini_batch": 4, "chunk": 8}


def test_the_page_is_what_the_measurements_give():
    assert TARGET.read_text() == page(), "run: python -m benchmarks.document"


def test_the_work_of_attention_is_counted_pair_by_pair():
    shape = Shape(2, 11, 3, 8)
    for name, window in (("attention, full", 11), ("attention, window 4", 4)):
        pairs = sum(min(t + 1, window) for t in range(11))
        found = cost(name, shape, 2, chunk=8, window=4, backward=False)
        assert found.flops == pytest.approx(2 * 3 * pairs * 4 * 8)  # two products of 8 channels for each pair
        assert found.bytes == 4 * 2 * 3 * 11 * 8 * 2  # q, k, v and y


@pytest.mark.parametrize("name", examples(**SIZES))
def test_every_example_has_a_cost_and_runs_with_gradients(name):
    example, shape = examples(**SIZES)[name], Shape(1, 17, 2, 16)
    inputs = draw(example, shape, "cpu")
    y = example.run(inputs, "chunked")
    assert y.shape[:2] == (1, 17)
    grads = torch.autograd.grad(y.sum(), list(inputs.values()), allow_unused=True)
    assert sum(g is not None for g in grads) >= 3
    work = cost(name, shape, 4, chunk=8, window=4, backward=True)
    assert work.flops > work.bytes > 0


def test_every_work_of_the_benchmark_is_an_example():
    assert {name for name, *_ in works("cpu")} == set(examples(window=256, mini_batch=16, chunk=256))


@pytest.mark.parametrize(("part", "prefix"), [("forward", "fwd_"), ("backward", "bwd_")])
def test_every_candidate_is_for_its_pass_and_fits_the_lists_of_blocks(part, prefix):
    first, *others = candidates(part)
    assert first == {}, "torch's own tiles come first, as a measure"
    for tiles in others:
        assert all(name.startswith(prefix) for name in tiles)
        assert all(BLOCK % size == 0 for name, size in tiles.items() if "BLOCK" in name)
        if part == "backward":
            assert tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"] == 0
            assert tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0


def test_a_candidate_that_fails_is_recorded_and_the_next_one_is_tried(monkeypatch):
    monkeypatch.setattr(flex, "TILES", {})
    monkeypatch.setattr(tune_flex, "measure", lambda run, device, seconds: {"median_ms": 1, "low_ms": 1, "high_ms": 1})
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    key = ((9, 0), 64)

    def run(both):
        if flex.TILES[key].get("fwd_num_warps") == 8:
            raise RuntimeError("no room\nout of shared memory")
        return [torch.full((3,), 2.0 if flex.TILES[key].get("fwd_USE_TMA") else 1.0)]

    found = list(try_all(["forward"], key, run, "cpu", 0.0))
    assert [record["tiles"] for record in found] == list(candidates("forward"))
    for record in found:
        if record["tiles"].get("fwd_num_warps") == 8:
            assert record["failed"] == "out of shared memory"
        else:
            assert record["distance"] == (1.0 if record["tiles"].get("fwd_USE_TMA") else 0.0)
            assert record["time"]["median_ms"] == 1


def test_everything_is_timed_before_anything_is_profiled(monkeypatch):
    done, saved = [], []

    def measure(*_args, **_options):
        done.append("timed")
        return dict.fromkeys(("median_ms", "low_ms", "high_ms"), 1.0)

    def profiled(_run):
        done.append("profiled")
        return {"device_ms": 1.0, "launches": 1, "kernels": []}

    small = [(name, Shape(1, 9, 2, 16), example, SIZES) for name, example in examples(**SIZES).items()]
    for name, stand_in in (("works", lambda _device: small), ("measure", measure), ("profiled", profiled)):
        monkeypatch.setattr(ops, name, stand_in)
    limit = ops.Ceilings(1e12, 1e12)
    found = ops.time_all("cpu", 0.0, "delta", limit, lambda records: saved.append(len(records)), profile=True)
    assert {r["by"] for r in found} == {"chunked", "naive"}
    assert all("profile_forward" in r and "profile_both" in r for r in found)
    assert done == ["timed"] * 2 * len(found) + ["profiled"] * 2 * len(found)
    assert saved == [2, 4, 4, 4]


def test_pieces_run_side_by_side_and_those_that_fail_say_why(tmp_path):
    pieces = {str(i): f"open({str(tmp_path / str(i))!r}, 'w').close()" for i in range(3)}
    pieces |= {"wrong": "raise SystemError('no such thing')", "slow": "import time; time.sleep(600)"}
    failed = side_by_side(pieces, 5, time.monotonic() + 5)
    assert failed == {"wrong": "did not run by itself: SystemError: no such thing"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]
