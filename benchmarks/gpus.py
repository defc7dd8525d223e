"""Everything that is measured on GPUs, on as many as there are: each job on GPUs of its own, and a table at the end.

python -m benchmarks.gpus --out OUT --work WORK. Jobs begin in their order as soon as what they need is there and a GPU
is free. Each leaves OUT/NAME.txt, most of them numbers in OUT/NAME.json, and OUT/jobs/NAME.json says what became of it;
called again, those that ended well are not repeated. Stores, models and run folders lie in WORK. Several of these
programs may share OUT and WORK, each with GPUs of its own.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import tyro

from benchmarks.timing import print_table
from fastweight.files import write_text

PYTHON = "python -m"
WELL, RUNS = "well", "runs"
COLUMNS = ["job", "what became of it", "seconds", "GPUs"]


@dataclass(frozen=True)
class Job:
    """commands: one after the other, with $WORK and the like in them. gpus: 0 for what needs none. limit: seconds, all
    in all. needs: names of jobs that must have ended well."""

    name: str
    commands: tuple[str, ...]
    gpus: int = 1
    limit: int = 600
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure on the GPUs of this machine."""

    out: Path
    """Where logs and numbers go."""
    work: Path
    """Where stores and runs go."""
    gpus: tuple[int, ...] = ()
    """Which to use; all if none is named."""
    only: tuple[str, ...] = ()
    """Names of the jobs to run, or how they begin; what else they need must be there, or come from another program."""
    skip: tuple[str, ...] = ()
    """The same for those to leave out."""
    seconds: int = 10**6
    """Begin nothing that could last longer than this from now."""
    training_seconds: int = 600
    """Of each contest run."""
    stage_seconds: tuple[int, int, int] = (160, 260, 340)
    """Of the conversion's attention transfer, distillation and fine-tuning."""
    documents: int = 16
    """Long texts that its report reads with each of four models: some 25 s a model for every four texts."""
    characters: int = 6 * 10**8
    """Of source code, at most."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """What is converted, as for `fastweight convert`."""
    tokenizer: str = ""
    """Folder with the tokenizer of that model, to make a store with; without it nothing is converted."""
    workers: int = max(1, (os.cpu_count() or 2) // 3)
    """Processes that tokenize, for each store."""


def jobs(options: Options) -> list[Job]:
    """All of them, the long ones first."""
    first, rest = contest(options)
    return [*texts(options), *first, *conversion(options), *rest, *kernels(), *several()]


def texts(options: Options) -> list[Job]:
    def store(name: str, tokenizer: str, fraction: float) -> str:
        return (
            f"{PYTHON} fastweight data prepare --source text:$WORK/text/*.py --tokenizer {tokenizer} "
            f"--heldout-fraction {fraction} --workers {options.workers} --out $WORK/{name}"
        )

    found = [Job("text", (f"{PYTHON} benchmarks.text --out $WORK --most {options.characters}",), gpus=0)]
    for vocabulary in (1024, 4096):
        folder = f"$WORK/tokenizer-{vocabulary}"
        train = (
            f"{PYTHON} fastweight data prepare --source text:$WORK/sample/*.py --tokenizer sp --bpe-vocab-size "
            f"{vocabulary} --heldout-fraction 0.004 --out {folder}"
        )
        made = store(f"store-{vocabulary}", f"sp:{folder}/tokenizer/tokenizer.model", 0.004)
        found.append(Job(f"store-{vocabulary}", (train, made), gpus=0, needs=("text",)))
    if options.tokenizer:
        made = store("store-model", str(Path(options.tokenizer).absolute()), 0.02)
        found.append(Job("store-model", (made,), gpus=0, needs=("text",)))
    return found


def contest(options: Options) -> tuple[list[Job], list[Job]]:
    """Training of the record's shape and of the base line's; then their scores, and what the choices are worth."""
    learn = "--stride 64 --batch-size 64 --learn-batch-size 64 --document --learner in-place --learn-rate 0.1"
    golf = f"{PYTHON} fastweight golf"
    runs, scores = list[Job](), list[Job]()
    for name, recipe, vocabulary in (("record", "golf-record-11x512", 4096), ("baseline", "golf-baseline-9x512", 1024)):
        run = f"$WORK/{name}"
        train = (
            f"{golf} train {recipe} --variant {name} --max-seconds {options.training_seconds} --calibration.tokens "
            f"1048576 --log.heldout-tokens 524288 --data.store $WORK/store-{vocabulary} --out {run}"
        )
        limit = options.training_seconds + 300
        runs.append(Job(f"golf-{name}", (train,), limit=limit, needs=(f"store-{vocabulary}",)))
        scores += [
            Job(f"golf-{name}-pack", (f"{golf} pack {run} --cap-bytes 16000000",), needs=(f"golf-{name}",)),
            Job(f"golf-{name}-eval", (f"{golf} eval {run} {learn}",), needs=(f"golf-{name}-pack",)),
        ]
    exact = f"{golf} eval $WORK/record {learn} --learn-modes cached exact"
    audit = (
        f"{golf} audit $WORK/record/model.fwa $WORK/store-4096 --max-tokens 100000 --json $JSON --report "
        "$OUT/golf-audit.md"
    )
    report = f"{golf} report $WORK/record $WORK/baseline --out $OUT/golf-report"
    choices = (
        f"{PYTHON} benchmarks.golf --parts rounding learners variants --store $WORK/store-1024 --compile --jobs 4 "
        "--json $JSON --out $WORK/choices"
    )
    artifact = f"{PYTHON} benchmarks.artifact --device cuda --calibration-tokens 131072 --symbols-millions 36"
    speed = (
        f"{PYTHON} benchmarks.train --presets golf-record-11x512 --device cuda --precision bfloat16 --compile "
        "--seq-len 2048 --batch-size 32 --seconds 8"
    )
    return runs, [
        *scores,
        Job("golf-record-exact", (exact,), needs=("golf-record-eval",)),
        Job("golf-audit", (audit,), needs=("golf-record-eval",)),
        Job("golf-report", (report,), gpus=0, needs=("golf-record-eval", "golf-baseline-eval")),
        Job("golf-choices", (choices,), limit=1300, needs=("store-1024",)),
        Job("golf-speed", (f"{speed} --json $JSON", f"{artifact} --json $OUT/golf-pack.json"), limit=300),
    ]


def conversion(options: Options) -> list[Job]:
    """A pretrained model with a window of 1,024 and a memory, trained at 8,192 tokens, then looked at from outside."""
    if not options.tokenizer:
        return []
    stages = (
        "--stages.view windows --stages.seq-len 8192 --stages.batch-size 4 --stages.micro-batch-size 4 "
        "--stages.no-activation-checkpointing --stages.compile --stages.heldout-tokens 131072 "
        "--stages.checkpoint-every 1000 --report.precision bfloat16 "
    ) + f"--report.documents {options.documents}"
    for stage, seconds in zip(("transfer", "distill", "tune"), options.stage_seconds, strict=True):
        stages += f" --stages.{stage}.max-seconds {seconds}"
    model = str(Path(options.model).absolute()) if Path(options.model).exists() else options.model
    convert = f"{PYTHON} fastweight convert {model} --data $WORK/store-model --out $WORK/converted"
    look = "from pathlib import Path; from fastweight.convert_demo import check_reload; check_reload(Path('converted'))"
    return [
        Job(
            "convert",
            (f"{convert} --mag.window 1024 --mag.no-gated {stages}",),
            limit=1500,
            needs=("store-model",),
        ),
        Job("convert-reload", (f'python -c "{look}"',), gpus=0, needs=("convert",)),
    ]


def kernels() -> list[Job]:
    tests = "tests/golden tests/ops tests/test_stepping.py tests/train/test_cuda.py tests/test_report.py"
    # These take the GPU wherever there is one.
    devices = "tests/ops/test_elementwise.py tests/ops/test_attention.py tests/mixers/test_lact.py"
    # Each process compiles for itself, without a pool of compilers of its own.
    check = f"env TORCHINDUCTOR_COMPILE_THREADS=1 {PYTHON} pytest -n 16 --dist loadgroup -p no:benchmark -q --tb=short"
    laws = f"{check} tests/laws/test_laws.py --device cuda --timeout 250"
    model = f"{PYTHON} benchmarks.model --seconds 3 --profile --json $JSON"
    return [
        Job(
            "tests",
            (f'{check} {tests} -k "cuda or gpu or device or recorded or replayed"', f"{check} {devices}"),
            limit=300,
        ),
        Job("laws", (f'{laws} -k "triton or fla or varlen or (flex and bfloat16) or kernels_are"',), limit=500),
        Job("ops", (f"{PYTHON} benchmarks.ops --seconds 1 --profile --json $JSON",), limit=500),
        Job("model", (f"{model} --feed-forward-checkpointing",), limit=500),
        Job("model-checkpointing", (f"{model} --activation-checkpointing --presets lact-760m-muon",), limit=200),
        Job("doctor", (f"{PYTHON} fastweight doctor --measure",), limit=300),
        Job("host", (f"{PYTHON} benchmarks.host --json $JSON",), limit=100),
        Job("tune-flex", (f"{PYTHON} benchmarks.tune_flex --json $JSON",), limit=500),
        Job("tune", (f"{PYTHON} benchmarks.tune --seconds-in-all 500 --processes 8 --json $JSON",), limit=600),
        Job("laws-chunked", (f"{laws} -k chunked",), limit=500),
        Job("sanitizer", (f"compute-sanitizer --error-exitcode 9 {PYTHON} fastweight doctor --measure",), limit=500),
    ]


def several() -> list[Job]:
    """Two GPUs."""
    mesh = f"{PYTHON} benchmarks.mesh --preset lact-760m-momentum --device cuda --precision bfloat16 --json $JSON"
    long = f"{mesh} --kind context --seq-len 131072 --activation-checkpointing --processes 1 2 --steps 3"
    shard = f"{mesh} --kind shard --seq-len 32768 --activation-checkpointing --processes 1 2 --compile"
    return [
        Job("mesh-shard", (f"{shard} --checkpoint",), gpus=2, limit=300),
        Job("mesh-narrow", (f"{shard} --gather bfloat16 --profile",), gpus=2, limit=300),
        Job("mesh-context", (long,), gpus=2, limit=300),
    ]


@dataclass
class Running:
    job: Job
    gpus: tuple[int, ...]
    log: TextIO
    began: float
    left: list[str]
    process: "subprocess.Popen[str] | None" = None


class Scheduler:
    """Jobs and GPUs: what runs where, and what has become of the rest."""

    def __init__(self, options: Options, every: list[Job], gpus: Iterable[int], say: Callable[[str], None] = print):
        self.options, self.free, self.say = options, list(gpus), say
        self.ends = time.monotonic() + options.seconds
        self.waiting, self.running = every, list[Running]()
        self.record: dict[str, dict[str, Any]] = {}
        (options.out / "jobs").mkdir(parents=True, exist_ok=True)
        options.work.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Until nothing runs and nothing more can begin. What runs is ended if this is interrupted."""
        try:
            while self.running or self.waiting:
                self._begin()
                time.sleep(0.2)
                for one in list(self.running):
                    self._look_at(one)
        finally:
            for one in self.running:
                _end(one)

    def well(self, name: str) -> bool:
        """Whether that job has ended well, now or earlier."""
        return self._read(name).get("became") == WELL

    def _read(self, name: str) -> dict[str, Any]:
        path = self.options.out / "jobs" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _elsewhere(self, name: str) -> bool:
        """Whether another program runs that job now."""
        record = self._read(name)
        return record.get("became") == RUNS and record["by"] != os.getpid() and Path(f"/proc/{record['by']}").exists()

    def _begin(self) -> None:
        """Start what can be started, in order; whoever waits for GPUs keeps those behind from taking them."""
        free = list(self.free)
        for job in list(self.waiting):
            if self.well(job.name):
                self._drop(job, "done before", keep=True)
            elif self._elsewhere(job.name):
                continue
            elif any(not self.well(name) for name in job.needs):
                if not any(self._comes(name) for name in job.needs if not self.well(name)):
                    self._drop(job, f"not begun: needs {', '.join(n for n in job.needs if not self.well(n))}")
            elif time.monotonic() + job.limit > self.ends:
                self._drop(job, "not begun: not enough time")
            elif job.gpus <= len(free):
                gpus, free = tuple(free[: job.gpus]), free[job.gpus :]
                self._start(job, gpus)
            elif job.gpus > len(self.free) + sum(len(one.gpus) for one in self.running):
                self._drop(job, f"not begun: needs {job.gpus} GPUs")
            else:
                free = []

    def _comes(self, name: str) -> bool:
        own = (*self.waiting, *(one.job for one in self.running))
        return any(job.name == name for job in own) or self._elsewhere(name)

    def _drop(self, job: Job, why: str, *, keep: bool = False) -> None:
        self.waiting.remove(job)
        self._note(job, why, keep=keep)

    def _start(self, job: Job, gpus: tuple[int, ...]) -> None:
        self.waiting.remove(job)
        self.free = [gpu for gpu in self.free if gpu not in gpus]
        log = (self.options.out / f"{job.name}.txt").open("w")
        one = Running(job, gpus, log, time.monotonic(), list(job.commands))
        self.say(f"{job.name}: begun" + (f" on GPU {', '.join(map(str, gpus))}" if gpus else ""))
        self.running.append(one)
        self._write(job, {"became": RUNS, "by": os.getpid()})
        self._next(one)

    def _next(self, one: Running) -> None:
        options, command = self.options, one.left.pop(0)
        places = {"WORK": options.work.absolute(), "OUT": options.out.absolute()}
        places["JSON"] = places["OUT"] / f"{one.job.name}.json"
        words = shlex.split(command)
        for name, path in places.items():
            words = [word.replace(f"${name}", str(path)) for word in words]
        words = [sys.executable if word == "python" else word for word in words]
        root = str(Path(__file__).parent.parent)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, one.gpus)), "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        }  # fmt: skip
        where = root if "pytest" in words else options.work
        one.log.write(f"$ {shlex.join(words)}\n")
        one.log.flush()
        one.process = subprocess.Popen(
            words,
            cwd=where,
            env=environment,
            stdout=one.log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _look_at(self, one: Running) -> None:
        assert one.process is not None
        code, seconds = one.process.poll(), time.monotonic() - one.began
        if code is None and seconds < one.job.limit:
            return
        if code == 0 and one.left:
            self._next(one)
            return
        _end(one)
        self.running.remove(one)
        self.free = sorted((*self.free, *one.gpus))
        what = WELL if code == 0 else "too long" if code is None else f"exit {code}"
        self._note(one.job, what, seconds, one.gpus)

    def _note(
        self, job: Job, what: str, seconds: float = 0.0, gpus: tuple[int, ...] = (), *, keep: bool = False
    ) -> None:
        """Say and write what became of a job; keep: what is written already."""
        self.say(f"{job.name}: {what}" + (f", {seconds:.0f} s" if seconds else ""))
        self.record[job.name] = {"became": what, "seconds": round(seconds, 1), "gpus": gpus}
        if not keep:
            self._write(job, self.record[job.name])

    def _write(self, job: Job, record: dict[str, Any]) -> None:
        write_text(self.options.out / "jobs" / f"{job.name}.json", json.dumps(record) + "\n")


def _end(one: Running) -> None:
    """End the job's processes, all of them."""
    if one.process is not None and one.process.poll() is None:
        os.killpg(one.process.pid, signal.SIGTERM)
        try:
            one.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
    one.log.close()


def chosen(options: Options) -> list[Job]:
    """The jobs that were asked for. Raises SystemExit for a name that is none."""
    every = jobs(options)
    for name in (*options.only, *options.skip):
        if not any(job.name.startswith(name) for job in every):
            raise SystemExit(f"no job is called {name}. There are: {', '.join(job.name for job in every)}.")
    asked = [job for job in every if not options.only or job.name.startswith(options.only)]
    return [job for job in asked if not (options.skip and job.name.startswith(options.skip))]


def main(options: Options) -> None:
    scheduler = Scheduler(options, chosen(options), options.gpus or range(torch.cuda.device_count()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scheduler.run()
    rows = [
        [name, r["became"], f"{r['seconds']:.0f}", ", ".join(map(str, r["gpus"]))]
        for name, r in scheduler.record.items()
    ]
    print_table(f"{torch.cuda.device_count()} GPUs", COLUMNS, rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
