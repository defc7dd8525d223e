"""fastweight doctor"""

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fastweight.commands.base import MaybePath, emit, parse, show


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Versions, devices, and which backend each op takes on each device and why."""

    measure: bool = False
    """Run every backend of every op beside the definition on each device (seconds), and keep how far it is from it:
    later runs say so in their first lines."""
    json: MaybePath = None
    """Also write the findings to this file."""


def main(name: str, arguments: list[str]) -> None:
    """Run `fastweight doctor`."""
    args = parse(Doctor, name, ["fastweight doctor", "fastweight doctor --measure --json doctor.json"], arguments)
    from fastweight.doctor import examine

    found = examine(measure=args.measure)
    show(_versions(found))
    show(_backends(found))
    emit(found, args.json)


def _versions(found: dict[str, Any]) -> Table:
    from fastweight.doctor import OPTIONAL

    table = Table("what", "version", "", title="installed", title_justify="left")
    table.add_row("fastweight", found["fastweight"], "")
    table.add_row("python", found["python"], found["platform"])
    for package, version in found["packages"].items():
        table.add_row(package, version or "MISSING", "" if version else f"needed: pip install {package}")
    for package, version in found["optional_packages"].items():
        table.add_row(package, version or "–", f"optional: {OPTIONAL[package]}")
    for device in found["devices"]:
        memory = f", {device['memory_bytes'] / 2**30:.0f} GiB" if "memory_bytes" in device else ""
        capability = f", compute capability {device['capability']}" if "capability" in device else ""
        note = f"{found['threads']} threads, {found['cpu_cores']} cores" if device["name"] == "cpu" else ""
        table.add_row(device["name"], f"{device['kind']}{memory}{capability}", note)
    return table


def _backends(found: dict[str, Any]) -> Table:
    columns = ("inputs", "op", "takes", "for one token", "distance from the definition", "cannot run")
    table = Table(*columns, title="backends (auto)", title_justify="left")
    for inputs, ops in found["backends"].items():
        for op, choice in ops.items():
            refusals = [f"{name}: {reason}" for name, reason in choice["refusals"].items() if reason]
            exact = [
                f"{name}: {a['output']:.0e}, gradients {a['gradient']:.0e}" for name, a in choice["accuracy"].items()
            ]
            known = "\n".join(exact) or ("–" if choice["auto"] == "naive" else "not measured: --measure")
            table.add_row(inputs, op, choice["auto"], choice["auto_one_token"], known, "\n".join(refusals) or "–")
    return table
