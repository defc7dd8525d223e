"""Who may import whom; and importing the library pulls in nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastweight

PACKAGE = Path(fastweight.__file__).parent

# A module may import what stands before it, never after it.
LAYERS = [
    {"configs", "devices", "files", "tensor_files", "state", "ranks"},
    {"ops", "data", "optim", "layers", "residual", "init"},
    {"mixers", "in_place"},
    {"model", "model_config", "model_folder", "block", "presets", "golf_presets", "effort"},
    {"learn", "artifact", "convert", "grow", "stepping", "generate", "accuracy", "backends", "distributed"},
    {"evaluate", "plots"},
    {"train"},
    {"diloco", "recipes", "hf", "doctor"},
    {"demo", "report", "audit"},
    {"conversion", "convert_demo", "golf"},
    {"tptt", "commands", "cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastweight":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastweight.")}
    return found & (set(RANK) | {p.stem for p in PACKAGE.iterdir()})


def breaches(path: Path) -> list[str]:
    own = room(path)
    return [other for other in imported_rooms(path) if other != own and RANK[other] > RANK[own]]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(path):
    if path == PACKAGE / "__init__.py":
        return
    assert room(path) in RANK, f"{room(path)} has no place in LAYERS; give it one"
    allowed = {("model", "presets")}  # Model.from_preset is the constructor users expect; imported inside the method
    assert [other for other in breaches(path) if (room(path), other) not in allowed] == []


def test_an_upward_import_is_found(tmp_path, monkeypatch):
    bad = PACKAGE / "ops" / "conv.py"
    monkeypatch.setattr(Path, "read_text", lambda self: "from fastweight.model import Model")
    assert breaches(bad) == ["model"]


def test_importing_the_library_needs_no_optional_package():
    heavy = ("triton", "transformers", "datasets", "pyarrow", "matplotlib", "tensorboard", "wandb", "tyro", "rich")
    code = f"import sys; import fastweight; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
