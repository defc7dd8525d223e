"""One process of several: makes the runs named on the command line, one after another."""

import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import runs  # noqa: E402  # found beside this file

from fastweight.distributed.mesh import MeshConfig  # noqa: E402
from fastweight.distributed.team import joined  # noqa: E402
from fastweight.train import train  # noqa: E402


def main(store: str, out: str, replicate: str, *names: str) -> None:
    torch.set_num_threads(1)
    with joined(120):
        for name in names:
            began = time.time()
            config = runs.run_config(store, name, mesh=MeshConfig(replicate=int(replicate)))
            train(config, Path(out) / name, model=runs.RUNS[name][0](), quiet=True)
            print(name, round(time.time() - began, 1), flush=True)


main(*sys.argv[1:])
