"""The demo in small: it prepares, trains, scores, draws and writes on; interrupted, it goes on where it was."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import fastweight.demo as demo
from fastweight.data import prepare
from fastweight.model import Model

SMALL = demo.DemoConfig(
    steps=4, seq_len=32, batch_size=2, documents=2, min_tokens=200, max_tokens=400, prompt_tokens=50, new_tokens=5
)


@contextmanager
def no_bar(what, unit):
    yield lambda done, total: None


def run(out, config=SMALL):
    return demo.run(out, config, say=lambda line: None, bar=no_bar)


@pytest.fixture
def small_text(tmp_path, monkeypatch):
    """A corpus of a few short texts in place of the standard library."""
    for i in range(24):
        (tmp_path / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    source = str(tmp_path / "*.txt")
    monkeypatch.setattr(
        demo, "prepare", lambda name, tokenizer, out: prepare(source, tokenizer, out, heldout_fraction=0.3)
    )


def test_both_models_have_about_the_same_size():
    with torch.device("meta"):
        memory, window = (Model(make()).num_parameters for make in (demo.memory_config, demo.window_config))
    assert abs(memory - window) < 0.005 * window


def test_the_demo_leaves_its_figures_its_picture_and_both_models(small_text, tmp_path):
    result = run(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert (tmp_path / "out" / "loss_by_position.png").read_bytes()[:4] == b"\x89PNG"
    assert set(result["scores"]) == {"memory on", "memory frozen", "window only"}
    assert len({scored["bytes"] for scored in result["scores"].values()}) == 1
    assert result["training"]["memory"]["tokens"] == 4 * 2 * 32


def test_a_second_run_trains_nothing_and_finds_the_same(small_text, tmp_path, monkeypatch):
    first = run(tmp_path / "out")
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("trained again"))
    second = run(tmp_path / "out")
    for name, scored in first["scores"].items():
        assert second["scores"][name]["bits_per_byte"] == scored["bits_per_byte"]


def test_a_demo_that_has_moved_is_still_the_finished_one(small_text, tmp_path, monkeypatch):
    first = run(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.setattr(demo, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run(tmp_path / "moved")["training"] == first["training"]


def test_an_interrupted_demo_goes_on_to_the_same_figures(small_text, tmp_path, monkeypatch):
    whole, train = run(tmp_path / "whole"), demo.train

    def stop_early(plan, out, **options):
        """Ends after its checkpoint, as a kill would."""
        part = replace(plan, log=replace(plan.log, checkpoint_every=2))
        train(part, out, **options)
        for unfinished in ("model", "checkpoints/step-000004"):
            shutil.rmtree(out / unfinished)
        (out / "latest").write_text("step-000002\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", stop_early)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.setattr(demo, "train", train)
    resumed = run(tmp_path / "cut")
    for name, scored in whole["scores"].items():
        assert resumed["scores"][name]["bits_per_byte"] == scored["bits_per_byte"]


def test_another_number_of_steps_needs_another_folder(small_text, tmp_path):
    run(tmp_path / "out")
    other = replace(SMALL, steps=5)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(tmp_path / "out", other)
