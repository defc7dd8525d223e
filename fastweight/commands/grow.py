"""fastweight grow"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastweight.commands.base import emit, parse, say

EXAMPLES = ["fastweight grow runs/small deep", "fastweight grow runs/small deeper --factor 3"]


@dataclass(frozen=True, kw_only=True)
class Grow:
    """Make a model deeper without changing what it computes: every block is followed by copies that add nothing yet.

    Train on from it: the copies start from trained weights and find their own task.
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]]
    """Model folder, or the folder of a training run."""
    destination: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DESTINATION")]]
    """The new model folder."""
    factor: int = 2
    """How many blocks each block becomes."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight grow`."""
    args = parse(Grow, name, EXAMPLES, arguments)
    from fastweight.commands.models import TOKENIZER_FOLDER, find_model
    from fastweight.configs import require
    from fastweight.grow import grow
    from fastweight.model import load

    source = find_model(args.source)
    require(not args.destination.exists(), f"{args.destination} exists already. Choose another folder.")
    model = load(source)
    grown = grow(model, args.factor)
    grown.save(args.destination)
    if (source / TOKENIZER_FOLDER).is_dir():
        shutil.copytree(source / TOKENIZER_FOLDER, args.destination / TOKENIZER_FOLDER)
    say(
        f"read      {source}: {len(model.blocks)} blocks, {model.num_parameters:,} parameters",
        f"written   {args.destination}: {len(grown.blocks)} blocks, {grown.num_parameters:,} parameters",
    )
    emit({"model": str(args.destination), "blocks": len(grown.blocks), "parameters": grown.num_parameters})
