"""What the documentation says runs, and the layer it builds obeys the laws."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from laws.laws import LAWS, Subject

from fastweight.mixers import base

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if "```python" in p.read_text())


def run_page(page: Path) -> dict:
    """Run a page's python blocks one after the other in one new module and return its names."""
    module = types.ModuleType(f"docs_{page.stem.replace('-', '_').lower()}")
    sys.modules[module.__name__] = module
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture(autouse=True)
def _as_on_a_users_machine(tmp_path, monkeypatch):
    """Examples may write files and register mixers; neither must outlive the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_MIXERS", dict(base._MIXERS))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_example_runs(page):
    names = run_page(page)
    for name, test in list(names.items()):
        if name.startswith("test_"):
            test()


@pytest.mark.parametrize("law", [law for law in LAWS if law != "backends"])  # it has no op, hence one backend
@pytest.mark.parametrize("case", ["slow", "fast"])
def test_the_layer_that_the_page_builds_obeys_the_law(case, law):
    names = run_page(ROOT / "docs" / "adding-a-layer.md")
    LAWS[law](Subject(names["Leaky"], names["CASES"][case], "auto", torch.float64))
