"""The program beside the artifact: all that scoring needs, and as small as it is said to be."""

import ast
import subprocess
import sys
import zipfile

from fastweight.golf.program import PACKAGE, count_files, minified, needed_modules, write_program


def test_the_program_is_what_is_written_and_equal_sources_give_equal_bytes(tmp_path):
    first = write_program(tmp_path / "a.zip")
    assert first == write_program(tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert first["bytes"] == (tmp_path / "a.zip").stat().st_size
    assert first["raw_bytes"] > first["minified_bytes"] > 2 * first["bytes"]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == first["files"]


def test_the_program_alone_is_enough_to_import_the_scorer(tmp_path):
    """Without this folder on the path; whatever is missing would not be found. Every module in it can be imported."""
    write_program(tmp_path / "program.zip")
    code = (
        "import sys, importlib, zipfile; sys.path.insert(0, 'program.zip'); import fastweight.golf.fresh\n"
        "files = zipfile.ZipFile('program.zip').namelist()\n"
        "names = [n[:-3].replace('/', '.').removesuffix('.__init__') for n in files]\n"
        "[importlib.import_module(n) for n in names if not n.endswith('__main__')]\n"
        "print(all('program.zip' in m.__file__ for n, m in sys.modules.items() if n.startswith('fastweight')))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.stdout.strip() == "True", done.stderr


def test_what_training_alone_needs_is_left_out():
    files = needed_modules()
    assert "golf/fresh.py" in files
    assert "mixers/ttt.py" in files
    assert not [file for file in files if file.startswith(("train/", "commands/", "hf/", "convert/", "recipes/"))]


def test_a_minified_program_does_the_same_without_its_comments():
    source = '"""Page."""\n# why\nclass A:\n    """A."""\n\n    def f(self):\n        """F."""\n\n\nX = "kept"\n'
    small = minified(source)
    assert "why" not in small
    assert [word for word in ("Page", "A.", "F.") if word in small] == []
    names: dict = {}
    exec(compile(small, "small", "exec"), names)
    assert names["X"] == "kept"
    assert names["A"]().f() is None


def test_every_module_of_the_library_can_be_minified():
    for path in PACKAGE.rglob("*.py"):
        ast.parse(minified(path.read_text(encoding="utf-8")))


def test_a_users_own_files_count_as_they_are(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_bytes(b"x" * 30)
    (tmp_path / "b.py").write_bytes(b"y" * 12)
    found = count_files([str(tmp_path / "code"), str(tmp_path / "b.py")])
    assert (found["files"], found["bytes"]) == (2, 42)
