"""Real processes on this machine, killed, slowed down and cut off while they train; and what that cost.

The same run is made twice: undisturbed, and with the troubles that were asked for. A process that is to be in trouble
stands still where it was asked for, a worker in the middle of a lease and the syncer in the middle of a merge, so what
happens depends on no timing. All times are taken on the one clock of the watching process.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastweight.configs import require, to_json
from fastweight.data import Store, prepare
from fastweight.diloco.chaos_process import Role
from fastweight.diloco.config import DilocoConfig
from fastweight.diloco.log import FOLDER as LOG
from fastweight.diloco.messages import Beat, parse_beat, raw_beat
from fastweight.diloco.processes import merged_model, read_state
from fastweight.diloco.rehearse import Rehearsal, small_model
from fastweight.diloco.run import create_run
from fastweight.diloco.simulate import ddp_bytes_per_token
from fastweight.diloco.storage import Storage
from fastweight.files import write_text
from fastweight.train.heldout import heldout_losses
from fastweight.train.objectives import make_objective

Say = Callable[[str], None]
SYNCER = "syncer"
LOOK_SECONDS = 0.05
# For the workers to see that the run is over; they look every 0.05 s.
END_SECONDS = 60.0


class Kill(NamedTuple):
    """Kill worker `who` after its step `at`, in an open lease, and start it again; the syncer in its merge `at`."""

    who: str
    at: int


class Slow(NamedTuple):
    """Worker `who` needs `factor` times as long."""

    who: str
    factor: float


class Cut(NamedTuple):
    """Worker `who` cannot reach the folder for `seconds`, from after its step `at` on."""

    who: str
    at: int
    seconds: float


def parse_kill(text: str) -> Kill:
    """1@200: worker 1 at its step 200. syncer@5: the syncer at merge 5."""
    found = re.fullmatch(r"(\d+|syncer)@(\d+)", text)
    require(found is not None, f"kill {text!r}: give WORKER@STEP (1@200) or syncer@MERGE (syncer@5).")
    assert found is not None
    return Kill(_worker(found[1]), int(found[2]))


def parse_slow(text: str) -> Slow:
    """2x3: worker 2 needs three times as long."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", text)
    require(found is not None and float(found[2]) >= 1, f"slow {text!r}: give WORKERxFACTOR, a factor of 1 or more.")
    assert found is not None
    return Slow(_worker(found[1]), float(found[2]))


def parse_cut(text: str) -> Cut:
    """3@100+8: worker 3 at its step 100 for 8 seconds."""
    found = re.fullmatch(r"(\d+)@(\d+)\+(\d+(?:\.\d+)?)", text)
    require(found is not None, f"cut {text!r}: give WORKER@STEP+SECONDS, e.g. 3@100+8.")
    assert found is not None
    return Cut(_worker(found[1]), int(found[2]), float(found[3]))


def _worker(text: str) -> str:
    return text if text == SYNCER else f"worker-{int(text)}"


def _once(what: str, found: list[str]) -> None:
    twice = [name for name in found if found.count(name) > 1]
    require(not twice, f"chaos: {' '.join(twice[:1])} {what}. Say it once.")


@dataclass(frozen=True, kw_only=True)
class ChaosPlan:
    """The run and its troubles. steps: inner steps of all workers together."""

    workers: int = 4
    steps: int = 2400
    lease_steps: int = 40
    seq_len: int = 64
    batch_size: int = 4
    dead_seconds: float = 5.0
    kills: tuple[Kill, ...] = ()
    slows: tuple[Slow, ...] = ()
    cuts: tuple[Cut, ...] = ()
    limit_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("workers", "steps", "lease_steps"):
            require(getattr(self, name) >= 1, f"chaos: {name} must be at least 1, got {getattr(self, name)}.")
        for trouble in (*self.kills, *self.slows, *self.cuts):
            known = trouble.who in (SYNCER, *self.names)
            require(known, f"chaos: there is no {trouble.who}; workers are numbered 0 to {self.workers - 1}.")
        _once("cannot be killed twice at the same place", [f"{kill.who}@{kill.at}" for kill in self.kills])
        _once("cannot be slowed down twice", [slow.who for slow in self.slows])

    @property
    def names(self) -> list[str]:
        """The workers."""
        return [f"worker-{i}" for i in range(self.workers)]

    def undisturbed(self) -> "ChaosPlan":
        """The same run without troubles."""
        return dataclasses.replace(self, kills=(), slows=(), cuts=())

    def diloco(self) -> DilocoConfig:
        """Merges wait for every worker that lives, slow ones get shorter leases; int8 in both directions."""
        return DilocoConfig(
            lease_steps=self.lease_steps,
            start_workers=self.workers,
            dylu=True,
            min_steps=min(5, self.lease_steps),
            up="int8",
            down="int8",
            dead_seconds=self.dead_seconds,
            snapshot_every=5,
        )


def chaos(out: Path, plan: ChaosPlan, store: Path | None = None, *, say: Say = print) -> dict[str, Any]:
    """Run `plan` without and with its troubles; write report.json into `out` and return the report.

    store: a byte-level token store; None: the standard library of this Python. Raises FileExistsError if `out` holds a
    report, ValueError if a trouble never came (the run was over before) or the time limit is reached.
    """
    if (out / "report.json").exists():
        raise FileExistsError(f"{out} holds a report already. Choose another folder.")
    if store is None:
        store = out / "data"
        prepare("python-stdlib", "bytes", store)
    say("undisturbed run")
    calm = _Party(out / "undisturbed", plan.undisturbed(), store, say).play()
    say("disturbed run")
    wild = _Party(out / "disturbed", plan, store, say).play()
    change = wild["loss_nats"] / calm["loss_nats"] - 1
    report = {"plan": _plan_record(plan), "undisturbed": calm, "disturbed": wild, "loss_change": change}
    write_text(out / "report.json", to_json(report) + "\n")
    return report


def _plan_record(plan: ChaosPlan) -> dict[str, Any]:
    troubles = {name: [list(t) for t in getattr(plan, name)] for name in ("kills", "slows", "cuts")}
    return dataclasses.asdict(plan) | troubles


class _Party:
    """One run of the plan: its processes, its troubles, its figures."""

    def __init__(self, folder: Path, plan: ChaosPlan, store: Path, say: Say):
        self.folder, self.plan, self.store, self.say = folder, plan, store.resolve(), say
        self.storage = Storage(str(folder / "run"))
        train = Rehearsal(steps=plan.steps, seq_len=plan.seq_len, batch_size=plan.batch_size).train(0)
        self.train = train
        create_run(self.storage, small_model(0), Store.open(store), train, plan.diloco())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.beats: dict[tuple[str, str], Beat] = {}
        self.kills, self.cuts = list(plan.kills), list(plan.cuts)
        self.cut_until: dict[str, float] = {}
        self.gone: dict[str, tuple[float, str]] = {}
        self.rejoined: dict[str, list[float]] = {}

    def play(self) -> dict[str, Any]:
        """Start everybody, make trouble, wait for the end, and measure."""
        began = time.monotonic()
        try:
            for name in (SYNCER, *self.plan.names):
                self._start(name)
            while self.processes[SYNCER].poll() is None:
                self._watch()
                self._make_troubles()
                late = time.monotonic() - began > self.plan.limit_seconds
                require(not late, f"chaos: the run takes more than {self.plan.limit_seconds:g} s; see {self.folder}.")
                time.sleep(LOOK_SECONDS)
            code = self.processes[SYNCER].returncode
            require(code == 0, f"chaos: the syncer ended with code {code}; see {self.folder}/{SYNCER}.err.")
            seconds = time.monotonic() - began
            self._wait_for_workers()
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        missed = [f"{trouble.who}@{trouble.at}" for trouble in (*self.kills, *self.cuts)]
        require(not missed, f"chaos: the run was over before {', '.join(missed)}. Let it come sooner, or raise steps.")
        return self._figures(seconds)

    def _wait_for_workers(self) -> None:
        """The syncer is done: nobody stands still or is cut off any more, and all end."""
        for name in self.plan.names:
            self._cut_file(name).unlink(missing_ok=True)
            self._standing_file(name).unlink(missing_ok=True)
        for name, process in self.processes.items():
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise ValueError(f"chaos: {name} does not see that the run is over; see {self.folder}.") from error
        self._watch()

    def _start(self, name: str) -> None:
        role = Role(
            name=name,
            run=str(self.folder / "run"),
            store="" if name == SYNCER else str(self.store),
            slowdown=next((slow.factor for slow in self.plan.slows if slow.who == name), 1.0),
            cut=str(self._cut_file(name)),
            standing=str(self._standing_file(name)),
            stops=sorted(trouble.at for trouble in (*self.kills, *self.cuts) if trouble.who == name),
        )
        command = ["fastweight.diloco.chaos_process", json.dumps(role._asdict())]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.folder / f"{name}.out").open("ab") as out, (self.folder / f"{name}.err").open("ab") as err:
            child = subprocess.Popen([sys.executable, "-m", *command], stdout=out, stderr=err, env=environment)
        self.processes[name] = child

    def _watch(self) -> None:
        """Look at every worker's sign of life, and at the log."""
        now = time.monotonic()
        for name in self.plan.names:
            beat = self._beat(name)
            if beat is not None:
                self.beats[name, beat.incarnation] = beat
                self._note_return(name, beat, now)
            if self.processes[name].poll() not in (None, 0):
                raise ValueError(f"chaos: {name} failed; see {self.folder}/{name}.err.")
        if SYNCER in self.gone and len(self._log_names()) > int(self.gone[SYNCER][1]):
            self._back(SYNCER, now)

    def _note_return(self, name: str, beat: Beat, now: float) -> None:
        """A killed worker is back when its new process has made a step."""
        if name in self.gone and beat.incarnation != self.gone[name][1] and beat.steps > 0:
            self._back(name, now)

    def _back(self, name: str, now: float) -> None:
        seconds = now - self.gone.pop(name)[0]
        self.rejoined.setdefault(name, []).append(round(seconds, 2))
        self.say(f"  {name} is at work again after {seconds:.1f} s")

    def _make_troubles(self) -> None:
        """Do what is due to those that stand still, and end what has lasted long enough."""
        for name, until in list(self.cut_until.items()):
            if time.monotonic() >= until:
                self._cut_file(name).unlink()
                del self.cut_until[name]
        for name in (SYNCER, *self.plan.names):
            file = self._standing_file(name)
            if file.exists():
                self._make_trouble(name, int(file.read_text()))
                file.unlink(missing_ok=True)

    def _make_trouble(self, name: str, at: int) -> None:
        for kill in [kill for kill in self.kills if kill.who == name and at >= kill.at]:
            self.kills.remove(kill)
            self._kill(name, at)
        for cut in [cut for cut in self.cuts if cut.who == name and at >= cut.at]:
            self.cuts.remove(cut)
            self.say(f"  {name} is cut off at its step {at} for {cut.seconds:g} s")
            self._cut_file(name).touch()
            self.cut_until[name] = time.monotonic() + cut.seconds

    def _kill(self, name: str, at: int) -> None:
        self.say(f"  {name} is killed at its {'merge' if name == SYNCER else 'step'} {at}, and started again")
        self.processes[name].kill()
        self.processes[name].wait()
        mark = str(len(self._log_names())) if name == SYNCER else self._last_incarnation(name)
        self.gone[name] = (time.monotonic(), mark)
        self._standing_file(name).unlink()
        self._start(name)

    def _last_incarnation(self, name: str) -> str:
        return [incarnation for worker, incarnation in self.beats if worker == name][-1]

    def _cut_file(self, name: str) -> Path:
        return self.folder.resolve() / f"{name}.cut"

    def _standing_file(self, name: str) -> Path:
        return self.folder.resolve() / f"{name}.standing"

    def _beat(self, name: str) -> Beat | None:
        data = raw_beat(self.storage, name)
        return None if data is None else parse_beat(data, name, None)

    def _log_names(self) -> list[str]:
        return self.storage.names(LOG)

    def _figures(self, seconds: float) -> dict[str, Any]:
        run, state = read_state(self.storage)
        model, split = merged_model(run, state), Store.open(self.store).split("heldout")
        with torch.random.fork_rng(devices=[]):
            loss = heldout_losses(model, make_objective(model, run.train), split, run.train)["loss_nats"]
        lost, doubled = count_samples(self.storage, run.total_samples)
        tokens = run.total_samples * self.plan.seq_len
        moved = sum(beat.bytes_read + beat.bytes_written for beat in self.beats.values())
        per_step = self.plan.workers * self.plan.batch_size * self.plan.seq_len
        ddp = ddp_bytes_per_token(model.num_parameters, self.plan.workers, per_step)
        return {
            "loss_nats": loss,
            "seconds": round(seconds, 1),
            "samples": run.total_samples,
            "samples_lost": lost,
            "samples_doubled": doubled,
            "seconds_to_rejoin": self.rejoined,
            "merges": state.ledger.merges,
            "leases_taken_back": state.ledger.voided,
            "steps_made": sum(beat.steps for beat in self.beats.values()),
            "steps_counted": self.plan.steps,
            "bytes_per_token": moved / tokens,
            "ddp_bytes_per_token": ddp,
            "fewer_bytes_than_ddp": ddp * tokens / moved,
        }


def count_samples(storage: Storage, total: int) -> tuple[int, int]:
    """Samples of 0..total that no merge holds, and those in more than one; from the log alone."""
    ranges: dict[int, range] = {}
    merged: Counter[int] = Counter()
    for name in storage.names(LOG):
        entry = json.loads(storage.read(f"{LOG}/{name}"))["entry"]
        if entry["kind"] == "lease":
            ranges[entry["id"]] = range(entry["first"], entry["first"] + entry["count"])
        elif entry["kind"] == "merge":
            for lease in entry["leases"]:
                merged.update(ranges[lease])
    return total - len(merged), sum(1 for count in merged.values() if count > 1)
