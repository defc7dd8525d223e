"""fastweight presets"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from fastweight.commands.base import emit, parse, show
from fastweight.configs import require

EXAMPLES = ["fastweight presets", "fastweight presets --match tiny"]


@dataclass(frozen=True, kw_only=True)
class Presets:
    """The named model sizes, with their parameter counts and layers.

    effective: parameters as often as a token meets them, those of a block once per visit.
    """

    match: str = ""
    """Show only names that contain this."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight presets`."""
    args = parse(Presets, name, EXAMPLES, arguments)
    from fastweight.commands.models import describe_layers
    from fastweight.effort import effective_parameters, empty_model
    from fastweight.presets import preset, preset_names

    names = [preset_name for preset_name in preset_names() if args.match in preset_name]
    require(len(names) > 0, f"no preset's name contains {args.match!r}. Known: {', '.join(preset_names())}.")
    models = {preset_name: empty_model(preset(preset_name)) for preset_name in names}
    counts = {preset_name: model.num_parameters for preset_name, model in models.items()}
    effective = {preset_name: effective_parameters(model) for preset_name, model in models.items()}
    table = Table("preset")
    for column in ("parameters", "effective", "d_model", "layers", "vocabulary"):
        table.add_column(column, justify="right")
    table.add_column("mixers")
    for preset_name in sorted(names, key=lambda n: (n.rpartition("-")[0], counts[n])):
        config = preset(preset_name)
        numbers = (counts[preset_name], effective[preset_name], config.d_model, len(config.visits), config.vocab_size)
        sizes = (f"{n:,}" for n in numbers)
        table.add_row(preset_name, *sizes, describe_layers(config))
    show(table)
    emit({"presets": counts, "effective": effective})
