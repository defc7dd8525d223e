"""Running a conversion, and going on with one."""

import dataclasses
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import to_json
from fastweight.conversion.beginning import Say, open_backbone, open_store
from fastweight.conversion.checks import check_recipe, check_stages
from fastweight.conversion.config import ConversionConfig
from fastweight.conversion.record import begun_with, settled
from fastweight.conversion.result import fitted_report, make_report, publish
from fastweight.convert.in_place import add_in_place_memory
from fastweight.convert.titanize import titanize
from fastweight.layers import InPlaceConfig
from fastweight.model import Model
from fastweight.train.stages import control, convert_stages


def convert(config: ConversionConfig, out: str | Path, *, say: Say = print, quiet: bool = False) -> dict[str, Any]:
    """Convert config.source in the folder `out`; returns the figures that out/result.json holds too.

    out/backbone, out/model: the model folders before and after; out/hf: the converted one for transformers; out/stages:
    the runs; out/report. Called again with the same settings, it goes on where it was stopped.
    Raises ValueError for settings that differ from those `out` was begun with, and for what a part refuses: all of it
    before the first stage.
    """
    out, config = Path(out), settled(config)
    check_recipe(config)
    backbone, tokenizer = open_backbone(config, begun_with(config, out), out, say)
    store = open_store(config, out, tokenizer, say)
    stages = dataclasses.replace(config.stages, store=str(store.path))
    say(f"memory    {config.recipe}: {_describe(config)}")
    model = _with_memory(config, backbone)
    check_stages(model, stages, store)
    if config.report is not None:
        fitted_report(config, backbone, store, say)
    done = convert_stages(model, out / "stages", stages, quiet=quiet)
    results = {"stages": done.stages}
    if done.model is not None:
        publish(done.model, out)
        if config.has_control:
            beside = control(backbone, out / "stages", stages, quiet=quiet)
            results["stages"] |= beside.stages
            done = dataclasses.replace(done, stopped=beside.stopped)
    results |= {"stopped": done.stopped, "model": str(out / "model") if done.model is not None else ""}
    if not done.stopped and config.report is not None:
        say("report    comparing on held-out text")
        results["report"] = make_report(out, say=lambda line: None, quiet=quiet).to_dict()
    files.write_text(out / "result.json", to_json(results) + "\n")
    return results


def _with_memory(config: ConversionConfig, backbone: Model) -> Model:
    if config.recipe == "mag":
        options = dataclasses.asdict(config.mag)
        options |= {"window": options["window"] or None}
        options |= {"num_sinks": options["num_sinks"] if options["window"] else 0}
        return titanize(backbone, **options, seed=config.seed)
    names = [f.name for f in dataclasses.fields(InPlaceConfig)]
    memory = InPlaceConfig(**{name: getattr(config.in_place, name) for name in names})
    return add_in_place_memory(backbone, memory, layers=config.in_place.layers, seed=config.seed)


def _describe(config: ConversionConfig) -> str:
    chosen = config.mag if config.recipe == "mag" else config.in_place
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(chosen).items())
