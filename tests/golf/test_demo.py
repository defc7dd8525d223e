"""The demo in small: from text to ledger, the same each time, also when it was interrupted on the way."""

import json
import os
import signal

import pytest
from golf.golf_cases import PROGRAM_BYTES
from training_cases import call_at_forward

from fastweight.audit import verify
from fastweight.data import prepare
from fastweight.golf import demo
from fastweight.golf.folder import RunFolder
from fastweight.golf.settings import RunSettings

SETTINGS = demo.DemoSettings(steps=4, cap_bytes=PROGRAM_BYTES + 180_000)


@pytest.fixture
def small_text(tmp_path, monkeypatch):
    """A few short texts in place of the standard library, a third of them held out."""
    for i in range(24):
        (tmp_path / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 12)
    monkeypatch.setattr(
        demo, "prepare", lambda source, tokenizer, out, **_: prepare(source, tokenizer, out, heldout_fraction=0.15)
    )
    return str(tmp_path / "*.txt")


def run(out, source):
    return demo.run_demo(out, SETTINGS, source=source, say=lambda line: None)


def test_the_demo_ends_with_a_reportable_score_and_interrupted_it_ends_with_the_same(small_text, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", small_text)
    assert whole["reportable"]
    assert [s["stage"] for s in whole["stages"]] == ["raw", "averaged", "packed", "sliding", "document", "learning"]
    assert whole["artifact"]["total_bytes"] <= SETTINGS.cap_bytes
    certificate = verify(json.loads((tmp_path / "whole" / "run" / "certificate.json").read_text()))
    assert certificate["verdict"] == "passed"
    assert (tmp_path / "whole" / "run" / "audit.md").read_text().startswith("# Audit: passed")

    make = demo.demo_model
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(demo, "demo_model", lambda seed: call_at_forward(make(seed), 2, stop))
    assert run(tmp_path / "cut", small_text) is None
    assert not RunFolder(tmp_path / "cut" / "run").artifact.exists()
    cut = run(tmp_path / "cut", small_text)
    assert cut["artifact"]["sha256"] == whole["artifact"]["sha256"]
    assert [s["nats"] for s in cut["stages"]] == [s["nats"] for s in whole["stages"]]


def test_other_settings_need_another_folder(small_text, tmp_path):
    folder = RunFolder(tmp_path / "out" / "run")
    folder.start(RunSettings(variant="another"))
    with pytest.raises(ValueError, match="was started with other settings"):
        run(tmp_path / "out", small_text)
