"""Tuning changes what it says, puts everything back, and outlives what fails."""

import json
import subprocess
import sys
import time

import pytest
import torch
from interpreter import interpreted, needs_triton

from fastweight.ops.lact import recorded
from fastweight.ops.ttt import layout

pytestmark = needs_triton


@pytest.fixture
def tune():
    from benchmarks import tune

    return tune


def registers(kernel):
    return layout.launch_options(kernel, 64, torch.bfloat16)["maxnreg"]


def test_every_planned_change_differs_from_what_there_is_and_has_a_name_of_its_own(tune):
    changes = tune.plan()
    assert len({tune.key_of([c]) for c in changes}) == len(changes) > 60
    assert all(tune.present(c.path) != c.value for c in changes)
    assert {c.work for c in changes} == {"TTT-Linear", "TTT-MLP", "LaCT, momentum + Muon"}
    assert {c.path[2] for c in tune.plan("mlp_walk")} == {"mlp_walk_held"}


def test_only_kernels_of_the_present_designs_are_tried(tune, monkeypatch):
    monkeypatch.setitem(layout.MLP_DESIGN, "backward", "streamed")
    kernels = {c.path[2] for c in tune.plan("LAUNCH[mlp")}
    assert kernels == {"mlp_forward_held", "mlp_replay", "mlp_reads", "mlp_backward"}
    monkeypatch.setitem(layout.MLP_DESIGN, "backward", "held")
    kernels = {c.path[2] for c in tune.plan("LAUNCH[mlp")}
    assert kernels == {f"mlp_{part}_held" for part in ("forward", "replay", "reads", "walk", "keys")}


def test_every_planned_change_is_seen_inside_and_gone_outside_even_after_an_error(tune):
    def look():
        return {c.path: tune.present(c.path) for c in tune.plan()}

    def fail_inside(change):
        with tune.changed([change]):
            assert tune.present(change.path) == change.value
            others = {path: value for path, value in look().items() if path != change.path}
            assert others == {path: value for path, value in before.items() if path in others}
            raise ArithmeticError

    before, options = look(), registers("linear_backward")
    for change in tune.plan():
        with pytest.raises(ArithmeticError):
            fail_inside(change)
        assert look() == before
    (fewer,) = [c for c in tune.plan("linear_backward") if c.path[1] == "REGISTERS" and c.value == 128]
    with tune.changed([fewer]):
        assert registers("linear_backward") == 128
    assert registers("linear_backward") == options == 255


def test_a_changed_tile_stays_a_tile(tune):
    from fastweight.ops.lact import fused_muon

    (change, *_) = tune.plan("MUON_TILES")
    with tune.changed([change]):
        assert fused_muon.MUON_TILES[2] == fused_muon.Tile(*change.value)
        assert fused_muon.MUON_TILES[2].warps == change.value[2]


def bench_of(tune, tried):
    """Reads take 10 ms less with two warps, the walk 20 ms less with two stages; one kernel fails with eight warps."""

    def make(work):
        def bench(changes):
            tried.append([str(c) for c in changes])
            with tune.changed(changes):
                if layout.LAUNCH["linear_replay"][64][0] == 8:
                    raise RuntimeError("out of resources\nmore words")
                gained = 10 * (layout.LAUNCH["linear_reads"][64] == (2, 1))
                gained += 20 * (layout.LAUNCH["linear_backward"][64] == (4, 2))
                return {"ms": 100.0 - gained, "unchanged_ms": 100.0, "distance": 1e-4}

        return bench

    return make


def test_changes_are_tried_one_by_one_then_the_best_together_and_a_failure_is_reported(tune, capsys):
    results, tried = {}, []
    tune.try_all(tune.plan("TTT-Linear"), bench_of(tune, tried), results, lambda: None, time.monotonic() + 60)
    best = ["layout.LAUNCH[linear_reads][64] = (2, 1)", "layout.LAUNCH[linear_backward][64] = (4, 2)"]
    assert tried[-1] == best
    assert all(len(changes) == 1 for changes in tried[:-1])
    table = tune.rows(results)
    assert table[0][1:5] == ["; ".join(best), "70.000", "100.000", "+42.9 %"]
    assert table[-1][1].startswith("layout.LAUNCH[linear_replay][64] = (8")
    assert table[-1][-1] == "RuntimeError: out of resources"


def test_a_change_must_give_the_values_of_the_unchanged_tables(tune, monkeypatch):
    from fastweight.ops.examples import Shape, examples
    from fastweight.ops.ttt import kernels_linear, kernels_linear_backward, kernels_shared

    interpreted(kernels_shared, kernels_linear, kernels_linear_backward)
    sizes = {"window": 1, "mini_batch": 4, "chunk": 1}
    name = "TTT-Linear, mini-batch 4"
    monkeypatch.setattr(recorded, "ENABLED", True)  # and so again after this test
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "works", lambda device: [(name, Shape(1, 20, 1, 16), examples(**sizes)[name], sizes)])
    monkeypatch.setattr(tune.Work, "record", lambda self: self)
    monkeypatch.setattr(tune, "in_turns", lambda graphs: [1.0, 2.0])
    change = tune.Change("TTT-Linear", (tune.TTT, "KEEP_EVERY"), 2)
    bench = tune.Bench("TTT-Linear")
    found = bench([change])
    assert found == {"ms": 1.0, "unchanged_ms": 2.0, "distance": found["distance"]}
    assert found["distance"] < 1e-6
    assert layout.KEEP_EVERY == 16
    monkeypatch.setattr(tune, "LIMIT", -1.0)
    with pytest.raises(ValueError, match="gives other values"):
        bench([change])


def test_a_later_run_goes_on_where_the_time_was_up_or_the_process_ended(tune, tmp_path, capsys):
    changes, results, tried = tune.plan("linear_reads"), {}, []
    tune.try_all(changes, bench_of(tune, tried), results, lambda: None, time.monotonic() - 1)
    assert (results, tried) == ({}, [])
    ended = tune.key_of(changes[:1])
    results[ended] = {"running": True}
    tune.try_all(changes, bench_of(tune, tried), results, lambda: None, time.monotonic() + 60)
    assert results[ended] == {"error": "ended the process that tried it"}
    assert tried == [[str(c)] for c in changes[1:]]
    tune.try_all(changes, bench_of(tune, tried), results, lambda: None, time.monotonic() + 60)
    assert len(tried) == len(changes) - 1


def test_results_of_another_machine_are_refused(tune, tmp_path):
    path = tmp_path / "tune.json"
    assert tune.load(path, {"device": "a"}) == {}
    path.write_text(json.dumps({"machine": {"device": "a"}, "results": {"x": {}}}))
    assert tune.load(path, {"device": "a"}) == {"x": {}}
    with pytest.raises(ValueError, match="Give --json another file"):
        tune.load(path, {"device": "b"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_what_does_not_run_by_itself_is_reported_before_anything_is_timed(tune):
    (change,) = [c for c in tune.plan("KEEP_EVERY") if c.work == "TTT-Linear" and c.value == 4]
    failed = tune.compile_all([change], 1, time.monotonic() + 120)
    assert list(failed) == [tune.key_of([change])]
    assert failed[tune.key_of([change])].startswith("did not run by itself: ")
    assert "CUDA" in failed[tune.key_of([change])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_plan_can_be_read():
    def call(*options):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.tune", *options], capture_output=True, text=True, check=False
        )

    assert "none. --show prints" in call().stderr
    assert "TTT-MLP: layout.HIDDEN_BLOCK = 32 (now 64)" in call("--show", "--only", "HIDDEN").stdout
