"""Measurements on several GPUs are shared out: order, needs, limits, and going on after an interruption."""

import json

import pytest

from benchmarks.gpus import Job, Options, Scheduler, chosen, jobs


def note(name: str, seconds: float = 0.0) -> str:
    """A command that writes what it was given, and takes some time."""
    told = "os.environ['CUDA_VISIBLE_DEVICES']"
    script = f"import os, time; print('on', {told}); open('order', 'a').write('{name} '); time.sleep({seconds})"
    return f'python -c "{script}"'


@pytest.fixture
def run(tmp_path):
    def run(every: list[Job], gpus=(0, 1), **settings) -> dict[str, str]:
        options = Options(out=tmp_path / "out", work=tmp_path / "work", **settings)
        scheduler = Scheduler(options, every, gpus, say=lambda text: None)
        scheduler.run()
        return {name: record["became"] for name, record in scheduler.record.items()}

    return run


def test_a_job_begins_when_what_it_needs_has_ended_well(run, tmp_path):
    every = [
        Job("late", (note("late"),), needs=("early",)),
        Job("early", (note("first", 0.3), note("second")), gpus=0),
        Job("wrong", ('python -c "raise SystemExit(3)"',)),
        Job("after wrong", (note("never"),), needs=("wrong",)),
    ]
    assert run(every) == {
        "early": "well", "late": "well", "wrong": "exit 3", "after wrong": "not begun: needs wrong",
    }  # fmt: skip
    assert (tmp_path / "work" / "order").read_text() == "first second late "


def test_each_job_sees_its_own_gpus_and_nobody_overtakes_one_that_waits_for_them(run, tmp_path):
    every = [
        Job("one", (note("one", 1.0),)),
        Job("both", (note("both"),), gpus=2),
        Job("behind", (note("behind"),)),
        Job("none", (note("none"),), gpus=0),
        Job("three", (note("three"),), gpus=3),
    ]
    assert run(every)["three"] == "not begun: needs 3 GPUs"
    order = (tmp_path / "work" / "order").read_text().split()
    assert order.index("both") < order.index("behind")
    assert order.index("none") < order.index("both")
    seen = {name: (tmp_path / "out" / f"{name}.txt").read_text().splitlines()[-1] for name in ("both", "none")}
    assert seen == {"both": "on 0,1", "none": "on "}


def test_what_ended_well_is_not_repeated_and_what_did_not_is(run, tmp_path):
    every = [Job("good", (note("good"),)), Job("bad", ('python -c "raise SystemExit(1)"',))]
    run(list(every))
    assert run(list(every)) == {"good": "done before", "bad": "exit 1"}
    assert (tmp_path / "work" / "order").read_text() == "good "


def test_a_job_that_takes_too_long_is_ended_with_all_its_processes(run):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert run([Job("long", (f'python -c "{child}"',), limit=1), Job("next", (note("next"),))], gpus=(0,)) == {
        "long": "too long", "next": "well",
    }  # fmt: skip


def test_nothing_begins_that_could_last_longer_than_there_is_time(run):
    assert run([Job("long", (note("long"),), limit=60), Job("short", (note("short"),), limit=9)], seconds=10) == {
        "long": "not begun: not enough time", "short": "well",
    }  # fmt: skip


def test_programs_that_share_a_folder_wait_for_each_other(run, tmp_path):
    folder = tmp_path / "out" / "jobs"
    folder.mkdir(parents=True)
    (folder / "gone.json").write_text(json.dumps({"became": "runs", "by": 2**22 + 1}))
    (folder / "there.json").write_text(json.dumps({"became": "runs", "by": 1}))
    end = f"open('{folder}/there.json', 'w').write('{{}}')".replace("{}", '{\\"became\\": \\"well\\"}')
    every = [Job("there", (note("twice"),)), Job("after", (note("after"),), needs=("there",))]
    every.append(Job("gone", (note("gone"), f'python -c "{end}"')))
    assert run(every) == {"gone": "well", "there": "done before", "after": "well"}
    assert (tmp_path / "work" / "order").read_text() == "gone after "


def test_every_job_needs_jobs_that_there_are_and_names_select(tmp_path):
    options = Options(out=tmp_path, work=tmp_path, tokenizer="t")
    every = jobs(options)
    names = [job.name for job in every]
    assert len(set(names)) == len(names)
    assert all(need in names for job in every for need in job.needs)
    some = chosen(Options(out=tmp_path, work=tmp_path, only=("golf",), skip=("golf-record",)))
    assert {job.name for job in some} == {n for n in names if n.startswith("golf") and not n.startswith("golf-record")}
    with pytest.raises(SystemExit, match="no job is called cook. There are: text"):
        chosen(Options(out=tmp_path, work=tmp_path, only=("cook",)))
