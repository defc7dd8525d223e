"""fastweight golf train | pack | eval | finish | audit | report | demo"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastweight.commands.base import MaybePath, MaybeStr, emit, parse, say
from fastweight.configs import near_names, require

USAGE = """usage: fastweight golf COMMAND [OPTIONS]

Contest runs (Parameter Golf): train within a time budget, pack the model under a cap of bytes, score the file as it is
read back from disk by a fresh process, with sliding windows and while it learns, and account for every step.

commands:
  train RECIPE  train, average, and collect Hessians, all on one clock (`fastweight golf train` lists the recipes)
  pack RUN      quantise and code the model so that program and file fit under the cap
  eval RUN      score raw, averaged and packed weights, then sliding windows, then learning; write the ledger
  finish RUN    pack and eval; also under torchrun, where the ranks share the work
  audit         test a score by experiment: `fastweight audit` under another name
  report RUN…   several runs side by side: mean and deviation over seeds, differences, p-values
  demo          all of it on this machine, in minutes

examples:
  fastweight golf demo
  fastweight golf train golf-record-11x512 --data.store data/text --out runs/record-0
  fastweight golf pack runs/record-0 --cap-bytes 16000000
  fastweight golf eval runs/record-0 --stride 64 --learner in-place --learn-rate 0.1
  torchrun --nproc-per-node 8 -m fastweight golf finish runs/record-0
  fastweight golf report runs/record-* runs/baseline-* --out runs/report

Called again after an interruption, a command goes on: a finished stage is not repeated.
`fastweight golf COMMAND --help` shows its options."""

Run = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]


def main(name: str, arguments: list[str]) -> int | None:
    """Run `fastweight golf`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        raise ValueError(f"unknown command golf {command!r}.{near_names(command, COMMANDS)}")
    return COMMANDS[command](rest)


def _train(arguments: list[str]) -> int | None:
    from fastweight.golf.settings import CalibrationSettings
    from fastweight.recipes import recipe, recipe_names
    from fastweight.train import TrainConfig

    names = recipe_names()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fastweight golf train RECIPE --data.store DIR --out RUN [OPTIONS]\n\nrecipes:")
        print("\n".join(f"  {name}" for name in names))
        print("\nexamples:\n  fastweight golf train tiny-looped --data.store data/stdlib --out runs/tiny-0")
        print("\n`fastweight golf train RECIPE --help` shows its options.")
        return 0 if arguments else 2
    name = arguments[0]
    require(name in names, f"unknown recipe {name!r}.{near_names(name, names)}")

    @dataclass(frozen=True, kw_only=True)
    class Train:
        """Train by a recipe, average the weights, and collect the Hessians for packing, all on the training clock.

        max_seconds is the budget of all that; without it the steps end the run.
        """

        out: Path
        """Folder of the run."""
        variant: MaybeStr = None
        """Name under which runs of several seeds are reported together; by default the recipe's."""
        train_only: bool = False
        """Leave the Hessians to `golf finish`, which collects them over all of its processes."""
        calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: recipe(name))

    examples = [f"fastweight golf train {name} --data.store data/stdlib --out runs/{name}-0 --seed 0"]
    Train.__doc__ = inspect.cleandoc(Train.__doc__ or "")
    args = parse(Train, f"golf train {name}", examples, arguments[1:])
    return _start(args, name)


def _start(args: Any, name: str) -> int:
    from fastweight import ranks
    from fastweight.commands.models import with_model_of_run
    from fastweight.golf.folder import RunFolder
    from fastweight.golf.training import calibrate, train_within
    from fastweight.train.signals import exit_code_of

    make_store = "`fastweight data prepare --source python-stdlib --out data/stdlib` makes one."
    require(args.config.data.store != "", f"golf train: name a token store: --data.store DIR. {make_store}")
    alone = "Start it alone, with --train-only, and then `torchrun … -m fastweight golf finish`."
    require(ranks.launched() == 1, f"golf train: training runs in one process, torchrun started several. {alone}")
    folder = RunFolder(args.out)
    record = train_within(folder, with_model_of_run(args.config), args.variant or name, args.calibration)
    if record["stopped"] not in ("", "time"):
        say("stopped; go on with the same command")
        return exit_code_of(record["stopped"]) or 1
    calibration = None if args.train_only else calibrate(folder)
    emit({"run": str(folder.path), "training": record, "calibration": calibration})
    return 0


def _pack(arguments: list[str]) -> None:
    from fastweight import ranks
    from fastweight.golf.folder import RunFolder
    from fastweight.golf.packing import PACKING
    from fastweight.golf.run import prepare
    from fastweight.golf.settings import PackSettings

    @dataclass(frozen=True, kw_only=True)
    class Pack:
        """Quantise the final model, code it, and fit it under the cap; with the program that scores it."""

        run: Run
        """Folder of a run that `golf train` has ended."""
        store: MaybeStr = None
        """Where the token store is now, if it has moved."""
        pack: Annotated[PackSettings, tyro.conf.arg(name="")] = field(default_factory=PackSettings)

    examples = ["fastweight golf pack runs/record-0 --cap-bytes 16000000 --spec.mlp.bits 5"]
    args = parse(Pack, "golf pack", examples, arguments)
    with ranks.joined():
        prepare(args.run, args.pack, say, store=args.store or "")
    record = RunFolder(args.run).record(PACKING)
    assert record is not None
    short = {name: record[name] for name in ("bytes", "total_bytes", "margin_bytes", "sha256", "seconds", "program")}
    _emit_once({"run": str(args.run)} | short)


def _eval(arguments: list[str]) -> None:
    from fastweight import ranks
    from fastweight.golf.run import evaluate
    from fastweight.golf.settings import EvalSettings

    @dataclass(frozen=True, kw_only=True)
    class Eval:
        """Score a packed run: raw, averaged and packed weights in windows side by side, then the packed file in sliding
        windows and while it learns; write ledger.json, ledger.md and ledger.png.

        Each stage is scored by a fresh process that reads the file from disk.
        """

        run: Run
        """Folder of a run that `golf pack` has packed."""
        store: MaybeStr = None
        """Where the token store is now, if it has moved."""
        eval: Annotated[EvalSettings, tyro.conf.arg(name="")] = field(default_factory=EvalSettings)

    examples = ["fastweight golf eval runs/record-0 --stride 64 --learner lora --learn-modes cached exact"]
    args = parse(Eval, "golf eval", examples, arguments)
    with ranks.joined():
        ledger = evaluate(args.run, args.eval, store=args.store or "")
    _show(ledger, args.run)


def _finish(arguments: list[str]) -> None:
    from fastweight import ranks
    from fastweight.golf.run import finish
    from fastweight.golf.settings import EvalSettings, PackSettings

    @dataclass(frozen=True, kw_only=True)
    class Finish:
        """All that comes after training: Hessians if they are missing, packing, scoring, the ledger.

        Under torchrun the ranks share calibration and scoring; rank 0 packs. If one fails, all stop and say why.
        """

        run: Run
        """Folder of a run that `golf train` has ended."""
        store: MaybeStr = None
        """Where the token store is now, if it has moved."""
        timeout: float = 1800.0
        """Seconds that a rank waits for the others."""
        pack: PackSettings = field(default_factory=PackSettings)
        eval: EvalSettings = field(default_factory=EvalSettings)

    examples = [
        "fastweight golf finish runs/record-0 --pack.cap-bytes 16000000 --eval.stride 64",
        "torchrun --nproc-per-node 2 -m fastweight golf finish runs/record-0",
    ]
    args = parse(Finish, "golf finish", examples, arguments)
    with ranks.joined(args.timeout):
        ledger = finish(args.run, args.pack, args.eval, store=args.store or "", say=say)
    _show(ledger, args.run)


def _report(arguments: list[str]) -> None:
    from fastweight.golf.comparison import compare_runs, write_comparison

    @dataclass(frozen=True, kw_only=True)
    class Report:
        """Several finished runs side by side: per variant and stage the mean and deviation over seeds, differences to
        the first variant at equal seeds, and Welch's p, in bits per byte and in nats per token."""

        runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN…")]]
        """Folders of runs with a ledger; the variant of the first is the one that others are compared with."""
        out: MaybePath = None
        """Folder for report.json, report.md and report.png."""

    examples = ["fastweight golf report runs/record-0 runs/record-1 runs/baseline-0 runs/baseline-1 --out runs/report"]
    args = parse(Report, "golf report", examples, arguments)
    comparison = compare_runs(args.runs)
    print(comparison.markdown())
    if args.out is not None:
        write_comparison(comparison, args.out)
        say(f"written: {args.out}/report.json, report.md, report.png")
    emit(comparison.to_dict())


def _audit(arguments: list[str]) -> int:
    from fastweight.commands.audit import main as audit

    return audit("golf audit", arguments)


def _demo(arguments: list[str]) -> int | None:
    from fastweight.golf.auditing import STAGE
    from fastweight.golf.demo import DemoSettings, run_demo
    from fastweight.golf.folder import RunFolder

    @dataclass(frozen=True, kw_only=True)
    class Demo:
        """A small recurrent model learns the standard library of this Python, is packed under a cap, and scored from
        the file by a fresh process, without and with learning; then the auditor tests that score by experiment.

        Nothing is downloaded and no GPU is needed. With the same Python, packages and number of threads the figures
        come out the same to the last digit. Run again, it goes on where it was interrupted.
        """

        out: Path = Path("golf-demo")
        """Folder for data, run, picture and report."""
        demo: Annotated[DemoSettings, tyro.conf.arg(name="")] = field(default_factory=DemoSettings)

    args = parse(Demo, "golf demo", ["fastweight golf demo", "fastweight golf demo --steps 50"], arguments)
    ledger = run_demo(args.out, args.demo, say=say)
    if ledger is None:
        return 130
    _show(ledger, args.out / "run", RunFolder(args.out / "run").record(STAGE))
    return None


def _show(ledger: dict[str, Any], run: Path, audited: dict[str, Any] | None = None) -> None:
    """The tables on stdout, and one JSON line. audited: the record of an audit, if there was one."""
    from fastweight import ranks
    from fastweight.golf.sheet import markdown

    if ranks.launch_rank() > 0:
        return
    print(markdown(ledger))
    say(f"written: {run}/ledger.json, ledger.md, ledger.png")
    stages = {stage["stage"]: stage["bits_per_byte"] for stage in ledger["stages"]}
    artifact = {name: ledger["artifact"][name] for name in ("bytes", "total_bytes", "margin_bytes", "sha256")}
    verdict = {}
    if audited is not None:
        body = audited["certificate"]["body"]
        say(f"audit: {body['verdict']}", f"written: {run}/certificate.json, audit.md")
        verdict = {"audit": body["verdict"]}
    emit({"run": str(run), "score": ledger["score"], "reportable": ledger["reportable"],
          "objections": ledger["objections"], "bits_per_byte": stages, "artifact": artifact, **verdict})  # fmt: skip


def _emit_once(result: dict[str, Any]) -> None:
    from fastweight import ranks

    if ranks.launch_rank() == 0:
        emit(result)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "pack": _pack,
    "eval": _eval,
    "finish": _finish,
    "audit": _audit,
    "report": _report,
    "demo": _demo,
}
