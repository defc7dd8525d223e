"""The scorer: reads models from disk in a process of its own and scores them; run by `python -m fastweight.golf.fresh`.

It is started on a job, a JSON file; nothing else of the process that trained and packed can reach it. Its clock starts
when the model is loaded and counts everything after that.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import fastweight
from fastweight import files
from fastweight.artifact import unpack
from fastweight.configs import require, to_json
from fastweight.data import Store
from fastweight.devices import pick_device
from fastweight.evaluate import Evaluation, Share, score, score_and_learn
from fastweight.golf.clock import Clock
from fastweight.golf.folder import file_digest, model_digest
from fastweight.learn import DocumentLora, GlobalSgd, InPlaceSgd
from fastweight.model import Model, load

LEARNERS = {"sgd": GlobalSgd, "lora": DocumentLora, "in-place": InPlaceSgd}
SECONDS_BETWEEN_LINES = 10.0


def main(arguments: list[str]) -> int:
    """Do the job in the file that is named; on an error its message is the last line of stdout."""
    try:
        run(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
    except (ValueError, OSError, RuntimeError) as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        return 2
    return 0


def run(job: dict[str, Any]) -> None:
    """Score every stage of `job` and write what was found, each to a file of its own when it is finished.

    job: program (the folder or zip that this code must come from), parent (the process that waits), store, split,
    original_bytes, device, threads, share [index, count], quiet, stages. Of a stage: name, out, source (a packed file
    or model folder), sha256 (of it), precision, reading (of `score`), learner ({} for none), seconds (the limit),
    made_from (kept with what is found).
    """
    here = Path(fastweight.__file__).parent.parent.resolve()
    require(here == Path(job["program"]).resolve(), f"the scorer runs from {here}, not from {job['program']}.")
    torch.set_num_threads(job["threads"])
    split = Store.open(job["store"]).split(job["split"], original_bytes=job["original_bytes"])
    held: tuple[str, Model, float] | None = None
    for stage in job["stages"]:
        if held is None or held[0] != stage["source"]:
            held = None  # two models at a time may be too much
            held = (stage["source"], *_load(stage, pick_device(job["device"])))
        _, model, load_seconds = held
        values = _score(job, stage, model, split)
        values |= {
            "made_from": stage["made_from"],
            "load_seconds": load_seconds,
            "parameters": model.num_parameters,
            "device": str(model.device),
        }
        files.write_text(stage["out"], to_json(values) + "\n")


def read_source(source: Path, sha256: str) -> Model:
    """The model in a packed file or a model folder; ValueError if it is not the one that `sha256` names."""
    found = model_digest(source) if source.is_dir() else file_digest(source)
    require(found == sha256, f"{source} is not the one that was to be scored: its SHA-256 is {found}, not {sha256}.")
    return load(source) if source.is_dir() else unpack(source)


def _load(stage: dict[str, Any], device: torch.device) -> tuple[Model, float]:
    start = time.perf_counter()
    model = read_source(Path(stage["source"]), stage["sha256"]).to(device).eval()
    return model, time.perf_counter() - start


def _score(job: dict[str, Any], stage: dict[str, Any], model: Model, split: Any) -> dict[str, Any]:
    clock, share = Clock(stage["seconds"]), Share(*job["share"])
    settings = dict(stage["learner"])
    kind, mode = settings.pop("kind", ""), settings.pop("mode", "")
    alone = kind == "sgd"  # the first share does all of it
    with _progress(stage["name"], clock, 1 if alone else share.count, job) as progress:
        narrow = torch.autocast(model.device.type, torch.bfloat16, enabled=stage["precision"] == "bfloat16")
        options = stage["reading"] | {"share": share, "progress": progress}
        with narrow:
            found: Evaluation = (
                score_and_learn(model, split, LEARNERS[kind](**_as_tuples(settings)), mode=mode, **options)
                if kind
                else score(model, split, **options)
            )
    return {"evaluation": found.to_dict(), "clock_seconds": clock.seconds}


def _as_tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


@contextmanager
def _progress(name: str, clock: Clock, count: int, job: dict[str, Any]) -> Iterator[Callable[[int, int], None]]:
    """Hard stop at the limit, or when nobody waits any more; a line every ten seconds."""
    last, quiet, reached = 0.0, job["quiet"], (0, 0)

    def update(done: int, total: int) -> None:
        nonlocal last, reached
        total = -(-total // count)
        reached = (done, total)
        clock.check(name, *reached)
        require(os.getppid() == job["parent"], f"{name}: the process that asked for it has gone.")
        if not quiet and clock.seconds - last >= SECONDS_BETWEEN_LINES:
            last = clock.seconds
            left = clock.seconds * (total - done) / max(1, done)
            print(f"{name}: {done:,} of about {total:,} targets, {left:.0f} s left", file=sys.stderr, flush=True)

    yield update
    clock.check(name, *reached)
    if not quiet:
        print(f"{name}: scored in {clock.seconds:.1f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
