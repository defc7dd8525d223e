"""The program that goes with a packed model: the modules of this library that scoring needs, in one small zip.

Python imports from the zip as it is, so what is counted is what runs.
"""

import ast
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastweight import files
from fastweight.configs import require

PACKAGE = Path(__file__).parent.parent
ENTRY = "golf/fresh.py"
# The scorer imports every layer, so all of these come along.
PLUGINS = ("mixers",)
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_program(path: Path) -> dict[str, Any]:
    """Write the program as a zip of sources without comments and docstrings; equal sources give equal bytes.

    Returns {"files", "raw_bytes", "minified_bytes", "bytes"}: of the sources, without comments, and of the zip.
    """
    sources = {file: (PACKAGE / file).read_text(encoding="utf-8") for file in needed_modules()}
    small = {file: minified(text) for file, text in sources.items()}
    files.write_atomically(path, lambda temporary: _write_zip(temporary, small))
    count = lambda texts: sum(len(text.encode()) for text in texts.values())  # noqa: E731
    sizes = {"raw_bytes": count(sources), "minified_bytes": count(small), "bytes": path.stat().st_size}
    return {"files": len(sources)} | sizes


def count_files(paths: Iterable[str]) -> dict[str, Any]:
    """The same figures for files of the user's own, which count as they are."""
    found = [file for path in paths for file in _expand(Path(path))]
    size = sum(file.stat().st_size for file in found)
    return {"files": len(found), "raw_bytes": size, "minified_bytes": size, "bytes": size}


def needed_modules() -> list[str]:
    """The files of this package that the scorer imports, directly or not, relative to the package."""
    found, left = set(), [ENTRY, *_inside(PLUGINS)]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        left += _parents(file) | set(_imports(file))
    return sorted(found)


def minified(source: str) -> str:
    """The same program without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            kept = [part for part in node.body if not _is_text(part)]
            node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.unparse(tree) + "\n"


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _inside(folders: Iterable[str]) -> set[str]:
    return {str(p.relative_to(PACKAGE)) for folder in folders for p in (PACKAGE / folder).rglob("*.py")}


def _parents(file: str) -> set[str]:
    """The __init__ of every folder that a module is in, which Python runs first."""
    return {str(folder / "__init__.py") for folder in Path(file).parents}


def _imports(file: str) -> Iterator[str]:
    for node in _running(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fastweight":
                yield from _file_of(parts[1:])


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every part of a program but what only type checkers read."""
    yield node
    only_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for child in node.orelse if only_types and isinstance(node, ast.If) else ast.iter_child_nodes(node):
        yield from _running(child)


def _file_of(parts: list[str]) -> Iterator[str]:
    place = PACKAGE.joinpath(*parts)
    for file in (place.with_suffix(".py") if parts else place / "__init__.py", place / "__init__.py"):
        if file.is_file():
            yield str(file.relative_to(PACKAGE))


def _expand(path: Path) -> list[Path]:
    require(path.exists(), f"program: {path} does not exist. Name the files that go with the model.")
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _write_zip(path: Path, texts: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file, text in texts.items():
            archive.writestr(zipfile.ZipInfo(f"fastweight/{file}", _EPOCH), text, zipfile.ZIP_DEFLATED, 9)
