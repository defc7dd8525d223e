"""One replica group: group.py STORE OUT LIGHTHOUSE, and the step before which it dies, -1 for never."""

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from distributed import runs  # found in the folder of all tests

from fastweight.distributed.mesh import ReplicaConfig
from fastweight.train import train
from fastweight.train.loop import Trainer

step = Trainer.step


def dying(self, batches) -> None:
    """A step, unless this group dies before it."""
    if self.tally.step == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, batches)


torch.set_num_threads(1)
store, out, lighthouse, dies_at = *sys.argv[1:4], int(sys.argv[4])
Trainer.step = dying
replicas = ReplicaConfig(most=2, least=2, lighthouse=lighthouse, timeout_seconds=120)
train(runs.run_config(store, "delta", replicas=replicas), out, go_on=True, model=runs.RUNS["delta"][0]())
