"""A contest run: what is scored is what was packed, no stage is repeated, and the ledger says it all."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import runner
from golf.golf_cases import CALIBRATION, PACK, SCORING, golf_config, golf_model, trained_run
from training_cases import make_store

from fastweight import load
from fastweight.artifact import CapError, unpack
from fastweight.data import Store
from fastweight.evaluate import score, score_and_learn
from fastweight.golf import packing, scoring, training
from fastweight.golf.folder import RunFolder
from fastweight.golf.fresh import read_source
from fastweight.golf.ledger import make_ledger, read_ledger
from fastweight.golf.run import evaluate, finish
from fastweight.golf.training import calibrate, train_within
from fastweight.learn import InPlaceSgd

STAGES = ["raw", "averaged", "packed", "sliding", "learning"]


def again(folder, pack=PACK, scoring=SCORING):
    return finish(folder.path, pack, scoring, say=lambda line: None, quiet=True)


def by_stage(ledger):
    return {stage["stage"]: stage for stage in ledger["stages"]}


# What is scored.


def test_golf_p9_every_stage_of_the_ledger_is_what_its_file_scores(finished, store):
    folder, ledger = finished
    split, found = Store.open(store).split("heldout"), by_stage(ledger)
    reading = {"seq_len": 32, "batch_size": 4, "max_tokens": 1500}
    sources = {"raw": load(folder.raw_model), "averaged": load(folder.final_model), "packed": unpack(folder.artifact)}
    for name, model in sources.items():
        assert found[name]["nats"] == score(model, split, context="windows", stride=32, **reading).nats
    packed, learner = sources["packed"], InPlaceSgd(chunk_size=16, lr=0.3)
    assert found["sliding"]["nats"] == score(packed, split, context="windows", stride=8, **reading).nats
    assert found["learning"]["nats"] == score_and_learn(packed, split, learner, **reading).nats
    assert list(found) == STAGES


def test_golf_p9_a_file_that_was_altered_after_packing_is_not_scored(copied):
    data = bytearray(copied.artifact.read_bytes())
    data[-40] ^= 1
    copied.artifact.write_bytes(data)
    with pytest.raises(ValueError, match="is not the file that was packed"):
        evaluate(copied.path, SCORING, quiet=True)


def test_golf_p9_the_scorer_itself_refuses_another_file_or_folder(finished):
    folder = finished[0]
    for source in (folder.artifact, folder.final_model):
        with pytest.raises(ValueError, match="is not the one that was to be scored"):
            read_source(source, "0" * 64)


def test_the_scorer_runs_from_the_program_that_is_counted(copied, monkeypatch):
    """Another program in its place, here this folder's own sources, is refused."""
    job = json.loads(next(copied.parts.glob("job-*")).read_text())
    file = copied.path / "job.json"
    file.write_text(json.dumps(job | {"program": str(copied.program)}))
    command = [sys.executable, "-m", "fastweight.golf.fresh", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "the scorer runs from" in json.loads(done.stdout)["error"]


def test_a_store_of_other_text_is_refused_wherever_it_lies(copied, store, tmp_path):
    other = make_store(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"other.*holds other data .* than the run"):
        evaluate(copied.path, SCORING, store=str(other), quiet=True)
    moved = shutil.copytree(store, tmp_path / "moved")
    assert evaluate(copied.path, SCORING, store=str(moved), quiet=True)["stages"] == read_ledger(copied.path)["stages"]


def test_a_trained_run_is_finished_after_its_store_has_moved(finished, store, tmp_path):
    text = shutil.copytree(store, tmp_path / "text")
    folder = trained_run(tmp_path / "run", text)
    moved = text.rename(tmp_path / "moved")
    ledger = finish(folder.path, PACK, SCORING, store=str(moved), say=lambda line: None, quiet=True)
    assert ledger["artifact"]["sha256"] == finished[1]["artifact"]["sha256"]
    assert [s["nats"] for s in ledger["stages"]] == [s["nats"] for s in finished[1]["stages"]]


def test_a_mixed_run_is_scored_on_no_other_store_either(store, tmp_path):
    further, other = (make_store(tmp_path / name, seed) for name, seed in (("further", 1), ("other", 2)))
    folder = trained_run(tmp_path / "run", store, mix={str(further): 0.25}, steps=2)
    record = folder.train / "config.json"
    kept = json.loads(record.read_text())
    for held in (kept, {name: value for name, value in kept.items() if name != "first_store"}):
        record.write_text(json.dumps(held))
        with pytest.raises(ValueError, match=r"other.*holds? other data .* than the run"):
            evaluate(folder.path, SCORING, store=str(other), quiet=True)
    record.write_text(json.dumps(kept))
    shutil.rmtree(further)  # what is mixed in is not scored, so it need not be here
    with pytest.raises(ValueError, match="is not packed yet"):
        evaluate(folder.path, SCORING, store=str(store), quiet=True)


# Finished stages, interrupted ones, changed ones.


@pytest.fixture
def no_work(monkeypatch):
    for module, name in ((training, "train"), (training, "collect_hessians"), (packing, "_write_artifact")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("done again"))
    monkeypatch.setattr(scoring.subprocess, "run", lambda *a, **k: pytest.fail("scored again"))


def test_a_finished_run_is_not_repeated(finished, copied, store, no_work):
    train_within(copied, golf_config(store), "tiny", CALIBRATION, model=golf_model(), quiet=True)
    assert again(copied)["stages"] == finished[1]["stages"]


@pytest.mark.parametrize("lost", ["learning"])
def test_only_the_stage_that_is_missing_is_scored_again(finished, copied, monkeypatch, lost):
    (copied.path / "stages" / f"{lost}.json").unlink()
    (copied.parts / f"{lost}-0-of-1.json").unlink()
    asked, honest = [], scoring.subprocess.run

    def run(command, **options):
        asked.extend(stage["name"] for stage in json.loads(Path(command[-1]).read_text())["stages"])
        return honest(command, **options)

    monkeypatch.setattr(scoring.subprocess, "run", run)
    ledger = again(copied)
    assert asked == [lost]
    assert [s["nats"] for s in ledger["stages"]] == [s["nats"] for s in finished[1]["stages"]]


def test_what_a_killed_evaluation_has_finished_is_kept(finished, copied, no_work):
    """Killed after the scorer's last stage and before any record of it: its parts are taken."""
    for name in STAGES:
        (copied.path / "stages" / f"{name}.json").unlink()
    assert [s["nats"] for s in again(copied)["stages"]] == [s["nats"] for s in finished[1]["stages"]]


@pytest.mark.parametrize("part", ["model.fwa", "stages/packing.json", "hessians.safetensors", "program.zip"])
def test_a_lost_part_is_made_again_and_is_the_same(finished, copied, part):
    before = finished[0].artifact.read_bytes()
    (copied.path / part).unlink()
    calibrate(copied)
    packing.pack_run(copied, PACK, lambda line: None)
    assert copied.artifact.read_bytes() == before
    assert (copied.path / part).is_file()


@pytest.mark.parametrize("part", ["model.fwa", "hessians.safetensors"])
def test_a_damaged_part_is_made_again_and_is_the_same(finished, copied, part):
    whole = (copied.path / part).read_bytes()
    (copied.path / part).write_bytes(whole[:1000])
    calibrate(copied)
    packing.pack_run(copied, PACK, lambda line: None)
    assert (copied.path / part).read_bytes() == whole
    assert copied.artifact.read_bytes() == finished[0].artifact.read_bytes()


def test_another_cap_packs_again_and_scores_only_what_depends_on_it(finished, copied, monkeypatch):
    asked = []
    monkeypatch.setattr(scoring, "_score", lambda folder, common, jobs: asked.extend(j["name"] for j in jobs) or "stop")
    with pytest.raises(ValueError, match="stop"):
        again(copied, dataclasses.replace(PACK, cap_bytes=PACK.cap_bytes - 2000))
    assert copied.record("packing")["total_bytes"] <= PACK.cap_bytes - 2000
    assert asked == ["packed", "sliding", "learning"]


def test_a_folder_of_another_run_is_refused(copied, store):
    for changes in ({"seed": 5}, {"lr": 0.5}):
        with pytest.raises(ValueError, match="was started with other settings"):
            train_within(copied, golf_config(store, **changes), "tiny", CALIBRATION, quiet=True)
    with pytest.raises(ValueError, match="variant: tiny → other"):
        train_within(copied, golf_config(store), "other", CALIBRATION, quiet=True)


def test_a_run_whose_training_has_not_ended_is_not_packed(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match="holds no contest run"):
        again(RunFolder(tmp_path / "nothing"))
    (copied.train / "result.json").unlink()
    with pytest.raises(ValueError, match="its training has not ended"):
        again(copied)


# Loud guards.


def test_a_cap_that_cannot_be_met_says_by_how_much_and_which_tensors_are_large(copied):
    cap = copied.program.stat().st_size + 5000
    with pytest.raises(CapError, match=r"embedding.weight"):
        again(copied, dataclasses.replace(PACK, cap_bytes=cap))
    assert read_ledger(copied.path)["artifact"]["cap_bytes"] == PACK.cap_bytes  # what was there is untouched


def test_program_and_file_together_are_below_the_cap_and_every_byte_is_accounted_for(finished):
    folder, ledger = finished
    a = ledger["artifact"]
    sizes = [path.stat().st_size for path in (folder.artifact, folder.program)]
    assert [a["bytes"], a["program"]["bytes"]] == sizes
    assert a["total_bytes"] == sum(sizes) == a["cap_bytes"] - a["margin_bytes"]
    assert a["margin_bytes"] >= 0
    parts = sum(g["bytes"] for g in a["groups"]) + a["tokenizer_bytes"] + a["head_bytes"]
    assert parts == pytest.approx(a["bytes"], abs=1e-6)


def test_a_part_of_the_text_is_marked_as_no_score(finished):
    assert not finished[1]["reportable"]
    assert "a part of the split was scored" in finished[1]["objections"][0]
    assert "NOT REPORTABLE: a part of the split" in finished[0].table.read_text()


def test_other_files_in_place_of_the_program_are_no_score(copied, tmp_path, monkeypatch):
    (tmp_path / "train_gpt.py").write_bytes(b"#" * 1000)
    other = dataclasses.replace(PACK, program=(str(tmp_path / "train_gpt.py"),), cap_bytes=16_000)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_score", lambda *_: "not now")
        with pytest.raises(ValueError, match="not now"):
            again(copied, other)
    assert copied.record("packing")["program"]["bytes"] == 1000
    ledger = make_ledger(copied, [copied.record(name) for name in STAGES], SCORING)
    assert "other files than those of the scorer were counted as program" in ledger["objections"]


def test_the_whole_text_under_a_cap_is_reportable_and_wrong_counts_are_not(copied, store):
    learnless = dataclasses.replace(SCORING, max_tokens=0, learner="none", stride=32)
    ledger = again(copied, scoring=learnless)
    split = Store.open(store).split("heldout")
    assert ledger["reportable"]
    assert [s["bytes"] for s in ledger["stages"]] == [split.num_bytes] * 4
    wrong = again(copied, scoring=dataclasses.replace(learnless, expected_bytes=split.num_bytes + 1))
    assert wrong["objections"] == [f"{split.num_bytes:,} bytes were scored, {split.num_bytes + 1:,} were expected"]


def test_the_ledger_is_written_as_json_markdown_and_picture(finished):
    folder, ledger = finished
    assert json.loads(folder.ledger.read_text()) == ledger
    assert folder.picture.read_bytes()[:4] == b"\x89PNG"
    lines = folder.table.read_text().splitlines()
    for stage in ledger["stages"]:
        line = next(line for line in lines if line.startswith(f"| {stage['stage']} "))
        assert f"{stage['bits_per_byte']:.4f}" in line
        assert stage["bits_per_byte"] == pytest.approx(stage["nats"] / 0.6931471805599453 / stage["bytes"])


# The command line.


@pytest.fixture
def fastweight(capsys):
    return runner(capsys)


def test_the_commands_lead_from_text_to_ledger(fastweight, store, tmp_path):
    sizes = [
        "--data.seq-len",
        "32",
        "--data.batch-size",
        "4",
        "--log.heldout-tokens",
        "256",
        "--log.heldout-every",
        "0",
    ]
    train = ["golf", "train", "tiny-looped", "--data.store", store, "--out", tmp_path / "run", "--steps", "2"]
    code, out, err = fastweight(*train, *sizes, "--schedule.warmup-steps", "1", "--calibration.tokens", "256")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["calibration"]["tokens"] == 256
    pack = ["golf", "pack", tmp_path / "run", "--cap-bytes", "400000"]
    code, _, err = fastweight(*pack, "--store", make_store(tmp_path / "other", seed=1))
    assert code == 2
    assert "holds other data" in err
    code, out, err = fastweight(*pack, "--store", shutil.copytree(store, tmp_path / "moved"))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["total_bytes"] <= 400_000
    few = ["--max-tokens", "300", "--seq-len", "32", "--stride", "8", "--learner", "none"]
    code, out, err = fastweight("golf", "eval", tmp_path / "run", *few)
    assert code == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert list(answer["bits_per_byte"]) == ["raw", "packed", "sliding"]  # the recipe does not average
    assert "| sliding |" in out
    code, out, _ = fastweight("golf", "report", tmp_path / "run", "--out", tmp_path / "report")
    assert code == 0
    assert (tmp_path / "report" / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tain"], "unknown command golf 'tain'. Did you mean train?"),
        (["train", "golf-recrd-11x512"], "Did you mean golf-record-11x512"),
        (["train", "tiny-looped", "--out", "x"], "name a token store"),
        (["eval", "no-such-run"], "no-such-run holds no contest run"),
        (["report", "no-such-run"], "no-such-run has no ledger yet"),
        (["pack", "no-such-run", "--groups"], "groups is empty; name those whose clips may move"),
        (
            ["eval", "no-such-run", "--learner", "sgd", "--learn-epochs", "2"],
            "2 learn_epochs are for learner sgd in mode",
        ),
        (["eval", "no-such-run", "--learn-modes", "exact", "--learn-epochs", "2"], "exact alone, got learner in-place"),
        (["eval", "no-such-run", "--seconds", "inf"], "seconds must be finite and not negative, got inf"),
        (["eval", "no-such-run", "--learn-rate", "nan"], "learn_rate must be finite and not negative, got nan"),
    ],
)
def test_what_is_wrong_is_said(fastweight, arguments, words):
    code, _, err = fastweight("golf", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["pack", "eval", "finish", "audit", "report", "demo"])
def test_every_command_has_a_help_with_an_example(fastweight, command):
    code, out, _ = fastweight("golf", command, "--help")
    assert code == 0
    assert f"fastweight golf {command}" in out
    assert "fastweight" in out.partition("examples:")[2]
