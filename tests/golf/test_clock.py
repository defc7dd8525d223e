"""P14: what each clock counts, and that it stops hard."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
from golf.golf_cases import SCORING, calibrated_run, golf_config, golf_model
from training_cases import call_at_forward

from fastweight import ranks
from fastweight.golf import training
from fastweight.golf.clock import Clock, OutOfTimeError
from fastweight.golf.folder import RunFolder
from fastweight.golf.fresh import _progress
from fastweight.golf.run import evaluate
from fastweight.golf.settings import CalibrationSettings, RunSettings
from fastweight.golf.training import calibrate, train_within


class Time:
    """A clock that goes on by `tick` whenever somebody looks."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 100.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_golf_p14_a_clock_goes_on_from_what_was_spent_and_is_over_a_margin_early():
    now = Time()
    clock = Clock(60.0, spent=40.0, margin=5.0, now=now)
    assert clock.seconds == 40.0
    now.now += 14.9
    assert not clock.is_over
    now.now += 0.1
    assert clock.is_over
    assert not Clock(0.0, spent=1e9).is_over  # no limit


def test_golf_p14_the_training_clock_includes_the_hessian_pass(finished):
    training = finished[1]["training"]
    assert training["calibration_seconds"] > 0
    assert training["clock_seconds"] == training["seconds"] + training["calibration_seconds"]


def test_golf_p14_the_evaluation_clock_counts_everything_after_loading(finished):
    for stage in finished[1]["stages"]:
        assert stage["clock_seconds"] >= stage["seconds"] > 0


def test_golf_p14_training_leaves_the_part_of_the_budget_that_calibration_is_given():
    settings = RunSettings(variant="x", budget_seconds=600.0, calibration=CalibrationSettings(seconds=14.0, margin=1.0))
    assert settings.train_seconds == 585.0
    assert RunSettings(variant="x").train_seconds == 0.0
    with pytest.raises(ValueError, match="nothing is left to train in"):
        RunSettings(variant="x", budget_seconds=15.0)
    with pytest.raises(ValueError, match="seconds must be finite and not negative, got inf"):
        CalibrationSettings(seconds=float("inf"))


def test_golf_p14_training_stops_by_the_clock_and_the_whole_stays_within_the_budget(store, tmp_path):
    """A step takes 20 ms here, so that the 10,000 steps of the config cannot be reached."""
    model = golf_model()
    model.embedding.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    budget = CalibrationSettings(tokens=1 << 30, seconds=1.5, margin=0.5)
    folder = RunFolder(tmp_path)
    record = train_within(
        folder, golf_config(store, steps=10_000, max_seconds=3.0), "t", budget, model=model, quiet=True
    )
    assert record["stopped"] == "time"
    assert 1.0 <= record["seconds"] < 1.5
    found = calibrate(folder)
    assert record["seconds"] + found["seconds"] <= 3.0


def test_golf_p14_calibration_stops_before_its_budget_is_used_up_but_reads_one_batch(store, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Clock", lambda limit, **options: Clock(1.0, spent=2.0))
    folder = calibrated_run(tmp_path, store)
    found = folder.record("calibration")
    assert found["cut_short"]
    assert found["tokens"] == 4 * 32


def test_golf_p14_all_ranks_stop_where_one_of_them_is_out_of_time(store, tmp_path, monkeypatch):
    """This rank has all the time; the other says at the third round that it has none."""
    answers = iter([False, True])
    monkeypatch.setattr(ranks, "any_rank", lambda what, own: next(answers) or own)
    found = calibrated_run(tmp_path, store).record("calibration")
    assert found["cut_short"]
    assert found["tokens"] == 2 * 4 * 32


def test_golf_p14_an_evaluation_that_takes_too_long_is_stopped_with_an_error_and_no_score():
    now = Time()
    job = {"quiet": True, "parent": os.getppid()}
    stopped = pytest.raises(OutOfTimeError, match=r"sliding: 10 s are over and 40 of 100 targets are scored \(40%\)")
    with stopped, _progress("sliding", Clock(10.0, now=now), 2, job) as update:
        update(10, 200)
        now.now += 10.0
        update(40, 200)


@pytest.mark.parametrize("when", ["with its last targets", "after them"])
def test_golf_p14_an_evaluation_whose_last_batch_ends_too_late_has_no_score_either(when):
    now = Time()
    late = pytest.raises(OutOfTimeError, match=r"10 s are over and 100 of 100 targets are scored \(100%\)")
    with late, _progress("sliding", Clock(10.0, now=now), 2, {"quiet": True, "parent": os.getppid()}) as update:
        update(40, 200)
        now.now += 10.0 if when == "with its last targets" else 0.0
        update(100, 200)
        now.now += 10.0


@pytest.mark.parametrize("batch_size", [4, 4096])
def test_golf_p14_a_stage_over_its_limit_stops_the_evaluation(copied, batch_size):
    with pytest.raises(ValueError, match="raw: 1e-06 s are over"):
        evaluate(copied.path, replace(SCORING, seconds=1e-6, batch_size=batch_size), quiet=True)


def test_a_scorer_whose_caller_was_killed_stops():
    gone = pytest.raises(ValueError, match="the process that asked for it has gone")
    with _progress("sliding", Clock(), 1, {"quiet": True, "parent": -1}) as update, gone:
        update(1, 2)


def test_the_time_of_a_resumed_run_goes_on(store, tmp_path):
    folder, config = RunFolder(tmp_path), golf_config(store, checkpoint_every=0)
    model = call_at_forward(golf_model(), 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first = train_within(folder, config, "t", CalibrationSettings(), model=model, quiet=True)
    assert first == {"stopped": "SIGTERM"}
    newest = folder.train / "checkpoints" / (folder.train / "latest").read_text().strip()
    spent = json.loads((newest / "trainer.json").read_text())["tally"]["seconds"]
    again = train_within(folder, config, "t", CalibrationSettings(), quiet=True)
    assert again["stopped"] == ""
    assert again["seconds"] > spent
