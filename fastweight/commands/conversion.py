"""fastweight convert, fastweight report"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastweight.commands.base import emit, parse, say
from fastweight.configs import require
from fastweight.conversion import ConversionConfig, InPlaceRecipe, MagConfig, Recipe
from fastweight.report import Report, ReportSettings
from fastweight.report.result import FILE as REPORT_FILE
from fastweight.train.signals import exit_code_of
from fastweight.train.stages import StageConfig, StagesConfig, cpu_stages, gpu_stages

CONVERT_EXAMPLES = [
    "fastweight convert HuggingFaceTB/SmolLM2-135M --data python-stdlib --out converted",
    "fastweight convert models/llama-3.2-1b --data data/books --out converted --mag.window 2048 --mag.layers 'every 2'",
    "fastweight convert SmolLM2.gguf --data my-texts/ --out out --stages.tune.steps 200 --stages.tune.max-seconds 0",
    "fastweight convert Qwen/Qwen3-0.6B --recipe in-place --data books/ --out new",
    "fastweight convert gpt2 --data notes.jsonl --out out --report.lengths 256 1024 --no-control",
]
REPORT_EXAMPLES = ["fastweight report converted", "fastweight report converted --again --json report.json"]


def _stages() -> StagesConfig:
    import torch

    return (gpu_stages if torch.cuda.is_available() else cpu_stages)("")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Give a pretrained decoder a memory: load it, add the memory, train it in stages, compare it honestly.

    A (--stages.transfer): each linear branch learns its own softmax branch. B (--stages.distill): the model learns the
    logits of its backbone. C (--stages.tune): low-rank adapters and the memory learn the text. A stage runs if it has
    steps or max-seconds, and ends with whichever comes first: for so many steps, however long they take, set
    max-seconds to 0. The defaults are for this machine: five minutes of training on a CPU, twenty on a GPU, and the
    control's beside them. The control is stage C on the backbone without a memory. Run again with the same settings, it
    goes on where it was stopped; until a stage has saved something, settings may change.
    """

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A folder with config.json and safetensors, a name on the hub, or a .gguf file."""
    data: str
    """A token store made with the model's tokenizer, or text, as `data prepare --source` takes it."""
    out: Path
    """Folder of the conversion: DIR/model, DIR/hf (for transformers), DIR/stages, DIR/report."""
    recipe: Recipe = "mag"
    """mag: a delta-rule memory beside attention (LiZA). in-place: the feed-forwards' down-projections learn."""
    gguf_file: str = ""
    """Name of the GGUF file within SOURCE."""
    heldout_fraction: float = 0.05
    """Part of the documents of a text that is kept aside for the report."""
    mag: MagConfig = field(default_factory=MagConfig)
    in_place: InPlaceRecipe = field(default_factory=InPlaceRecipe)
    stages: StagesConfig = field(default_factory=_stages)
    control: bool = True
    """Train the control without a memory, too; --no-control does not."""
    report: ReportSettings = field(default_factory=ReportSettings)
    compare: bool = True
    """End with the report; with --no-compare, `fastweight report DIR --again` makes it later."""
    seed: int = 0
    """Of the memory's first weights."""


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Print the report of a conversion: what the memory is worth against the backbone and its controls."""

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """The conversion's folder."""
    again: bool = False
    """Make the report, or what of it is missing or was measured for other weights or settings; without it the saved one
    is printed."""
    json: Path | None = None
    """Also write the whole report to this file."""


def main(name: str, arguments: list[str]) -> int | None:
    """Run `fastweight convert` or `fastweight report`."""
    return convert(name, arguments) if name == "convert" else report(name, arguments)


def convert(name: str, arguments: list[str]) -> int:
    """Run `fastweight convert`."""
    args = parse(Convert, name, CONVERT_EXAMPLES, arguments)
    from fastweight.conversion import convert

    require(not args.stages.store, "convert: --stages.store is set by the command. Give the store, or text, as --data.")
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(ConversionConfig) if f.name != "report"}
    shared["stages"] = _fitting_stages(args)
    config = ConversionConfig(**shared, report=args.report if args.compare else None)
    with resumable():
        result = convert(config, args.out, say=say)
    finish(result, args.out)
    return exit_code(result)


def _fitting_stages(args: Convert) -> StagesConfig:
    """The stages, without the default stage A where the recipe has no linear branches that it could teach."""
    if args.recipe == "mag" or args.stages.transfer != _stages().transfer:
        return args.stages
    say("stage A   left out: it teaches linear branches, recipe in-place has none")
    return dataclasses.replace(args.stages, transfer=StageConfig())


@contextmanager
def resumable() -> Iterator[None]:
    """Say of an interruption between the stages what it means; within one, the stage saves and returns."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        raise


def finish(result: dict[str, Any], folder: Path) -> None:
    """Print what a conversion came to: the report, and its figures as JSON."""
    if result.get("report"):
        _show(Report.from_dict(result["report"]), folder)
    emit({key: value for key, value in result.items() if key != "report"} | _short(result.get("report")))
    if result["stopped"]:
        say(f"stopped by {result['stopped']}; the same command goes on")


def exit_code(result: dict[str, Any]) -> int:
    """0, or the code of the signal that stopped the conversion."""
    return exit_code_of(result["stopped"])


def report(name: str, arguments: list[str]) -> None:
    """Run `fastweight report`."""
    args = parse(ReportCommand, name, REPORT_EXAMPLES, arguments)
    found = _made(args.folder) if args.again else _saved(args.folder)
    _show(found, args.folder)
    emit({"conversion": str(args.folder)} | _short(found.to_dict()), args.json, found.to_dict())


def _made(folder: Path) -> Report:
    from fastweight.conversion import make_report

    with resumable():
        return make_report(folder, say=say)


def _saved(folder: Path) -> Report:
    from fastweight.conversion import load_conversion

    if not (folder / "report" / REPORT_FILE).is_file():
        load_conversion(folder)  # a folder that is no conversion is named as such
        raise FileNotFoundError(
            f"{folder} has no report yet. `fastweight report {folder} --again` makes it once the conversion is "
            "finished; an unfinished one goes on with its `fastweight convert`."
        )
    return Report.load(folder / "report")


def _show(found: Report, folder: Path) -> None:
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 200).print(found.table())
    say(f"written: {folder / 'report'} (report.md, report.json, report.png)")


def _short(found: dict[str, Any] | None) -> dict[str, Any]:
    return {} if found is None else {"report": {"documents": found["documents"], "verdict": found["verdict"]}}
