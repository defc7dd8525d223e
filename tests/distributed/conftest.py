"""One launch of two processes and one of four for all tests: what they wrote, beside the same runs in one process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from distributed import cut_cases, runs
from ports import free_port, place_of
from training_cases import make_store

import fastweight
from fastweight.data import Store, write_weights
from fastweight.train import train

WORKER = Path(__file__).parent / "worker.py"
ROOT = Path(fastweight.__file__).parent.parent
SECONDS = 270  # a minute's work on two free cores
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script or module in so many processes that work together on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ | SETTINGS)


def launch_unwatched(arguments: list[str]) -> list[tuple[int, str]]:
    """(exit code, stderr) of two processes that work together, where no launcher ends one when the other is gone."""
    port = free_port()
    both = [
        subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | SETTINGS | place_of(rank, port),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, words) for process, words in zip(both, said, strict=True)]


def make_runs(processes: int, store: Path, jobs: list[dict]) -> subprocess.CompletedProcess[str]:
    return launch(processes, [str(WORKER), str(store), json.dumps(jobs)])


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """With the weights "random" for its tokens, and beside it the store "other"."""
    corpus = tmp_path_factory.mktemp("corpus")
    folder, _ = make_store(corpus), make_store(corpus / "other", seed=1)
    split = Store.open(folder).split("train")
    lengths = split.document_ends - split.document_starts - 1
    write_weights(folder, "random", lambda numbers: (np.random.default_rng(i).random(lengths[i]) for i in numbers))
    return folder


@pytest.fixture(scope="session")
def alone(store, tmp_path_factory):
    """Name of a run → its folder, made in this process when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")

    def make(name: str) -> Path:
        out = folder / name
        if not out.exists():
            train(runs.run_config(store, name), out, model=runs.RUNS[name][0](), quiet=True)
        return out

    return make


@pytest.fixture(scope="session")
def two(store, alone, tmp_path_factory):
    """The folder with all runs of two processes, and "alone-…": runs of one that two have gone on with."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [{"run": name, "out": str(folder / name)} for name in runs.RUNS]
    for name in ("muon", "carried", "mixed"):
        shutil.copytree(alone(name), folder / f"alone-{name}")
        jobs.append({"run": name, "out": str(folder / f"alone-{name}"), "resume": "step-000008"})
    jobs.append({"run": "delta", "out": str(folder / "stopped"), "fault": "stop"})
    jobs.append({"run": "lact", "out": str(folder / "bfloat16"), "gather": "bfloat16", **runs.BFLOAT16})
    done = make_runs(2, store, jobs)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def four(store, two, tmp_path_factory):
    """The folder with runs of four processes, two replicas of two; "two-…": runs of two that four have gone on with."""
    folder = tmp_path_factory.mktemp("four")
    jobs = [{"run": name, "out": str(folder / name), "replicate": 2} for name in (*runs.KINDS, "muon", "packed")]
    for name in ("muon", "carried", "memory"):
        shutil.copytree(two / name, folder / f"two-{name}")
        jobs.append({"run": name, "out": str(folder / f"two-{name}"), "resume": "step-000008"})
    done = make_runs(4, store, jobs)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def cut_by_two(store, alone, tmp_path_factory):
    """Two processes that read a half of every sequence each: the folder with their runs, and in "cases" what they say
    of all cases of `cut_cases`."""
    folder = tmp_path_factory.mktemp("cut-by-two")
    (folder / "cases").mkdir()
    names = [*cut_cases.CASES, *cut_cases.PRESETS, "looped"]
    jobs: list[dict] = [{"ahead": True}, {"cases": names, "turns": 1, "out": str(folder / "cases")}]
    jobs += [{"run": name, "out": str(folder / name), "context": 2} for name in runs.CUT]
    jobs.append({"run": "lact", "out": str(folder / "compiled"), "context": 2, "changes": {"compile": True}})
    shutil.copytree(alone("muon"), folder / "alone-muon")
    jobs.append({"run": "muon", "out": str(folder / "alone-muon"), "context": 2, "resume": "step-000008"})
    done = make_runs(2, store, jobs)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="session")
def cut_by_four(store, cut_by_two, tmp_path_factory):
    """Four processes: cases and runs in which four, or two of two replicas or shards, share a sequence."""
    folder = tmp_path_factory.mktemp("cut-by-four")
    jobs: list[dict] = []
    for turns, names in cut_cases.FEW.items():
        out = folder / f"turns-{turns}"
        out.mkdir()
        jobs.append({"cases": names, "turns": turns, "out": str(out)})
    jobs.append({"run": "lact", "out": str(folder / "lact"), "context": 4, "turns": 2})
    jobs.append({"run": "packed", "out": str(folder / "packed"), "context": 2, "replicate": 2})
    jobs.append({"run": "looped", "out": str(folder / "looped"), "context": 2})
    shutil.copytree(cut_by_two / "muon", folder / "two-muon")
    jobs.append({"run": "muon", "out": str(folder / "two-muon"), "context": 2, "resume": "step-000008"})
    done = make_runs(4, store, jobs)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder
