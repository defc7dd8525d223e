"""fastweight presets"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from fastweight.commands.base import emit, parse, show
from fastweight.configs import require

if TYPE_CHECKING:
    from fastweight.model import ModelConfig

EXAMPLES = ["fastweight presets", "fastweight presets --match tiny"]


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The named model sizes, with their parameter counts and layers."""

    match: str = ""
    """Show only names that contain this."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight presets`."""
    args = parse(Presets, name, EXAMPLES, arguments)
    from fastweight.commands.models import describe_layers
    from fastweight.presets import preset, preset_names

    names = [preset_name for preset_name in preset_names() if args.match in preset_name]
    require(len(names) > 0, f"no preset's name contains {args.match!r}. Known: {', '.join(preset_names())}.")
    counts = {preset_name: _count(preset(preset_name)) for preset_name in names}
    table = Table("preset")
    for column in ("parameters", "d_model", "layers", "vocabulary"):
        table.add_column(column, justify="right")
    table.add_column("mixers")
    for preset_name in sorted(names, key=lambda n: (n.rpartition("-")[0], counts[n])):
        config = preset(preset_name)
        sizes = (f"{n:,}" for n in (counts[preset_name], config.d_model, len(config.visits), config.vocab_size))
        table.add_row(preset_name, *sizes, describe_layers(config))
    show(table)
    emit({"presets": counts})


def _count(config: ModelConfig) -> int:
    """Parameters of a model of this config, counted without allocating one."""
    import torch

    from fastweight.model import Model

    with torch.device("meta"):
        return Model(config).num_parameters
