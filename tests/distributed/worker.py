"""One process of several: makes the runs that a JSON list names, one after another.

Each entry: run (a name of runs.RUNS) and out; replicate, context, turns, gather, dtype of the weights, changes of
settings; resume (a checkpoint's name) to go on in `out`; fault, what process 1 does before step 4: "raise", "kill", or
"stop" (SIGTERM to itself). Or: cases (names that distributed.cut_cases knows), turns and out: compare them with one
process, and write what each process has found to OUT/RANK.json. Or: ahead, for cut_cases.go_ahead.
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

from distributed import cut_cases, runs  # found in the folder of all tests

from fastweight.distributed.mesh import MeshConfig
from fastweight.distributed.team import joined
from fastweight.train import train
from fastweight.train.loop import Trainer

FAULT_STEP = 4


# Everything but the code generator, which needs a minute to compile even a tiny model.
torch.compile = functools.partial(torch.compile, backend="aot_eager")


def main(store: str, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    with joined(600) as team:
        for job in jobs:
            if "ahead" in job:
                cut_cases.go_ahead()
            elif "cases" in job:
                found = cut_cases.differences(job["cases"], job["turns"])
                (Path(job["out"]) / f"{team.rank}.json").write_text(json.dumps(found))
            else:
                with pytest.MonkeyPatch.context() as patch:
                    if "fault" in job:
                        patch.setattr(Trainer, "step", faulty(job["fault"]))
                    make(store, job)


def make(store: str, job: dict) -> None:
    mesh = MeshConfig(**{key: job[key] for key in ("replicate", "context", "turns", "gather") if key in job})
    config = runs.run_config(store, job["run"], mesh=mesh, **job.get("changes", {}))
    model = None if "resume" in job else runs.RUNS[job["run"]][0]().to(getattr(torch, job.get("dtype", "float64")))
    train(config, job["out"], resume=job.get("resume", False), model=model, quiet=True)


def faulty(kind: str):
    step = Trainer.step

    def run(self, batches) -> None:
        if self.team.rank == 1 and self.tally.step == FAULT_STEP:
            if kind == "raise":
                raise ValueError("the disk of this machine is full")
            os.kill(os.getpid(), {"stop": signal.SIGTERM, "kill": signal.SIGKILL}[kind])
        step(self, batches)

    return run


main(sys.argv[1], json.loads(sys.argv[2]))
