"""One process of a replica group: group.py STORE JOBS.

JOBS is a JSON list of runs that the group makes one after another, but for those that are finished. Each entry: run (a
name of runs.RUNS), out, lighthouse; dies, "START@STEP" (the processes of that start of the group kill themselves before
that step); replicas, mesh and changes, further settings.
"""

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from distributed import runs  # found in the folder of all tests

from fastweight.distributed.mesh import MeshConfig, ReplicaConfig
from fastweight.distributed.team import joined
from fastweight.train import train
from fastweight.train.ending import RESULT
from fastweight.train.loop import Trainer


def make(store: str, job: dict) -> None:
    replicas = ReplicaConfig(
        most=2, least=2, lighthouse=job["lighthouse"], timeout_seconds=120, **job.get("replicas", {})
    )
    mesh = MeshConfig(**job.get("mesh", {}))
    config = runs.run_config(store, job["run"], replicas=replicas, mesh=mesh, **job.get("changes", {}))
    train(config, job["out"], go_on=True, model=runs.RUNS[job["run"]][0]())


def dying(dies: str):
    """`Trainer.step` that kills this process where `dies` says."""
    step, start = Trainer.step, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    @functools.wraps(step)
    def run(self, batches) -> None:
        if f"{start}@{self.tally.step}" == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, batches)

    return run


def main(store: str, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    with joined(600):
        for job in (job for job in jobs if not (Path(job["out"]) / RESULT).exists()):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "step", dying(job.get("dies", "")))
                make(store, job)


main(sys.argv[1], json.loads(sys.argv[2]))
