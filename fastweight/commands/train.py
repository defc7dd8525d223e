"""fastweight train"""

import dataclasses
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastweight.commands.base import MaybeStr, emit, parse, say
from fastweight.configs import near_names, require

USAGE = """usage: fastweight train RECIPE --out DIR [OPTIONS]
       fastweight train --resume DIR
       fastweight train --list

RECIPE gives every setting a value; each can be changed. `fastweight train RECIPE --help` shows them all.

examples:
  fastweight train --list
  fastweight train tiny-delta --data.store data/stdlib --out runs/first --steps 100
  fastweight train tiny-delta --data.store data/stdlib --out runs/muon --optimizer.name muon --seed 1
  fastweight train --resume runs/first"""
_MAKE_STORE = "`fastweight data prepare --source python-stdlib --out data/stdlib` makes one."


def main(name: str, arguments: list[str]) -> int | None:
    """Run `fastweight train`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--list":
        return _list()
    if arguments[0] == "--resume":
        return _resume(arguments[1:])
    return _start(arguments[0], arguments[1:])


def _list() -> None:
    from rich.table import Table

    from fastweight.commands.base import show
    from fastweight.recipes import recipe, recipe_names

    table = Table("recipe", "model", "optimizer", "steps", "tokens per step")
    for name in recipe_names():
        c = recipe(name)
        tokens = f"{c.data.seq_len * c.data.batch_size:,}"
        table.add_row(name, c.model.preset or c.model.folder, c.optimizer.name, f"{c.steps:,}", tokens)
    show(table)
    emit({"recipes": recipe_names()})


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Go on with a run from its newest checkpoint, with its own settings, as if it had never stopped."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """The run's folder."""
    checkpoint: MaybeStr = None
    """Name of an earlier checkpoint, e.g. step-000500."""
    store: MaybeStr = None
    """Where the run's token store is now, if it has moved or the run named it from another folder."""
    mix: tuple[str, ...] = ()
    """Where the further stores of data.mix are now, in their order."""


def _resume(arguments: list[str]) -> int:
    examples = ["fastweight train --resume runs/first", "fastweight train --resume runs/first --checkpoint step-000500"]
    args = parse(Resume, "train --resume", examples, arguments)
    from fastweight.train import load_run_config, train

    config = None
    if args.store is not None or args.mix:
        config = load_run_config(args.run)
        data, moved = config.data, args.mix or tuple(config.data.mix)
        require(len(moved) == len(data.mix), f"--mix: the run has {len(data.mix)} further store(s), got {len(moved)}.")
        mix = dict(zip(moved, data.mix.values(), strict=True))
        data = dataclasses.replace(data, store=args.store or data.store, mix=mix)
        config = dataclasses.replace(config, data=data)
    return _finish(train(config, args.run, resume=args.checkpoint or True))


def _start(name: str, arguments: list[str]) -> int:
    from fastweight.commands.models import with_model_of_run
    from fastweight.recipes import recipe, recipe_names
    from fastweight.train import TrainConfig, train

    if name not in recipe_names():
        hint = " An option came first: the recipe's name goes before the options." if name.startswith("-") else ""
        raise ValueError(f"unknown recipe {name!r}.{near_names(name, recipe_names())}{hint}")

    @dataclass(frozen=True, kw_only=True)
    class Run:
        """Train by a recipe; every setting of it can be changed here."""

        out: Path
        """Folder of the run: settings, metrics, checkpoints, and the final model in DIR/model."""
        go_on: bool = False
        """If DIR holds a checkpoint of a run with these settings, resume it; else start. For whatever starts a command
        again after a fault: torchrun --max-restarts, a queue."""
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=lambda: recipe(name))

    examples = [f"fastweight train {name} --data.store data/stdlib --out runs/first --steps 100"]
    Run.__doc__ = f"{Run.__doc__}\n\n{inspect.cleandoc(TrainConfig.__doc__ or '')}"
    args = parse(Run, f"train {name}", examples, arguments)
    require(args.config.data.store != "", f"train {name}: name a token store: --data.store DIR. {_MAKE_STORE}")
    return _finish(train(with_model_of_run(args.config), args.out, go_on=args.go_on))


def _finish(result: Any) -> int:
    if int(os.environ.get("RANK", "0")):
        return result.exit_code  # one process speaks for all
    emit(result.to_dict())
    if result.stopped not in ("", "time"):
        say(f"stopped by {result.stopped}; go on with: fastweight train --resume {result.out}")
    elif result.model:
        say(f"model     {result.model}")
    return result.exit_code
