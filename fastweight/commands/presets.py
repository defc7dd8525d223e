"""fastweight presets"""

from dataclasses import dataclass

from rich.table import Table

from fastweight.commands.base import emit, parse, show
from fastweight.configs import require

EXAMPLES = ["fastweight presets", "fastweight presets --match tiny"]


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The named model sizes, with their parameter counts and layers."""

    match: str = ""
    """Show only names that contain this."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight presets`."""
    args = parse(Presets, name, EXAMPLES, arguments)
    from collections import Counter

    import torch

    from fastweight.model import Model
    from fastweight.presets import preset, preset_names

    names = [preset_name for preset_name in preset_names() if args.match in preset_name]
    require(len(names) > 0, f"no preset's name contains {args.match!r}. Known: {', '.join(preset_names())}.")
    table = Table("preset", title_justify="left")
    for column in ("parameters", "d_model", "layers", "vocabulary"):
        table.add_column(column, justify="right")
    table.add_column("mixers")
    counts = {}
    for preset_name in names:
        config = preset(preset_name)
        with torch.device("meta"):
            counts[preset_name] = Model(config).num_parameters
        kinds = Counter(config.blocks[i].mixer.kind for i in config.visits)
        mixers = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        sizes = (f"{n:,}" for n in (counts[preset_name], config.d_model, len(config.visits), config.vocab_size))
        table.add_row(preset_name, *sizes, mixers)
    show(table)
    emit({"presets": counts})
