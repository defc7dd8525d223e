"""Every kind of source gives the same documents, and says what is wrong with a bad file."""

import gzip
import json
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastweight.data import open_source
from fastweight.data.sources import StdlibSource

DEV = "the dev extra brings zstandard"
TEXTS = ["first", "second é 漢字", "line one\nline two\r\n", "", "last"]


def lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts).encode()


def write_arrow(path, texts=TEXTS, stream=True, field="text"):
    table = pa.table({field: texts})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_saved_dataset(folder, texts=TEXTS):
    folder.mkdir(parents=True)
    half = len(texts) // 2
    write_arrow(folder / "data-00000-of-00002.arrow", texts[:half])
    write_arrow(folder / "data-00001-of-00002.arrow", texts[half:])
    write_arrow(folder / "cache-1234.arrow", ["not part of the data set"])
    names = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "x"}))
    (folder / "dataset_info.json").write_text("{}")


def all_documents(spec, text_field="text"):
    source = open_source(str(spec), text_field)
    return [text for file in source.files() for text in source.documents(file)]


def one_file(path: Path):
    name = path.name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines()))
    elif name.endswith(".zst"):
        packer = pytest.importorskip("zstandard", reason=DEV).ZstdCompressor()
        data = lines()
        path.write_bytes(packer.compress(data[:30]) + packer.compress(data[30:]))  # two frames, as pzstd writes
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TEXTS, "other": [1] * len(TEXTS)}), path, row_group_size=2)
    elif name.endswith(".arrow"):
        write_arrow(path, stream="stream" in name)
    else:
        path.write_bytes(lines())


ROW_FILES = ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("name", ROW_FILES)
def test_every_row_format_gives_the_same_documents(tmp_path, name):
    one_file(tmp_path / name)
    assert all_documents(tmp_path / name) == TEXTS
    assert all_documents(tmp_path) == TEXTS


@pytest.mark.parametrize(("kind", "like"), [("jsonl", "a.jsonl"), ("parquet", "a.parquet"), ("arrow", "file.arrow")])
def test_a_prefix_reads_files_of_any_name(tmp_path, kind, like):
    one_file(tmp_path / like)
    (tmp_path / like).rename(tmp_path / "data.bin")
    assert all_documents(f"{kind}:{tmp_path / 'data.bin'}") == TEXTS


def test_text_files_are_one_document_each_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "a.md": "A\r\n", "sub/c.txt": "C"}.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    assert all_documents(tmp_path) == ["A\r\n", "B", "C"]
    assert [file.name for file in open_source(str(tmp_path)).files()] == ["a.md", "b.txt", "sub/c.txt"]


def test_a_glob_crosses_folders(tmp_path):
    for name in ("x/1.rst", "x/y/2.rst", "3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert all_documents(f"text:{tmp_path}/**/*.rst") == ["x/1.rst", "x/y/2.rst"]


def test_compressed_text_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert all_documents(tmp_path / "a.txt.gz") == ["one\ntwo\n"]


def test_null_rows_are_empty_documents(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert all_documents(tmp_path / "a.parquet") == ["a", "", "b"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert all_documents(tmp_path / "a.jsonl") == ["a\ufffdb", "😀"]


def test_a_dataset_folder_gives_its_own_files_only(tmp_path):
    write_saved_dataset(tmp_path / "d")
    assert all_documents(f"hf:{tmp_path / 'd'}") == TEXTS
    assert all_documents(tmp_path / "d") == TEXTS


def test_a_split_of_a_dataset_folder_is_chosen_by_name(tmp_path):
    write_saved_dataset(tmp_path / "d" / "train", ["t1", "t2"])
    write_saved_dataset(tmp_path / "d" / "test", ["e1", "e2"])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert all_documents(f"hf:{tmp_path / 'd'}") == ["t1", "t2"]
    assert all_documents(f"hf:{tmp_path / 'd'}:test") == ["e1", "e2"]
    with pytest.raises(ValueError, match="no split 'tset'.*Did you mean test"):
        open_source(f"hf:{tmp_path / 'd'}:tset")


class Rows(list):
    """What `datasets.load_dataset` returns, as far as it is used."""

    column_names = ("text", "id")
    _fingerprint = "abc"
    dataset_size = 12

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


def test_a_named_dataset_goes_through_the_datasets_package(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Rows({"text": text, "id": 1} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert all_documents("hf:some/name:validation") == TEXTS
    assert all_documents("hf:some/name") == TEXTS
    assert asked == [("some/name", "validation"), ("some/name", "train")]
    with pytest.raises(ValueError, match="no column 'txet'.*Did you mean text"):
        open_source("hf:some/name", "txet")


def test_a_named_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"fastweight\[data\]"):
        open_source("hf:some/name")


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow.parquet"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_reader_package_says_what_to_install(tmp_path, monkeypatch, name, module):
    one_file(tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"fastweight\[data\]"):
        all_documents(tmp_path / name)


def test_the_standard_library_is_ten_megabytes_of_real_text():
    source = open_source("python-stdlib")
    files = source.files()
    assert sum(file.size_bytes for file in files) > 8_000_000
    assert [file.name for file in files] == sorted(file.name for file in files)
    assert not any("site-packages" in file.name or file.name.startswith("test/") for file in files)
    argparse = next(file for file in files if file.name == "argparse.py")
    assert "class ArgumentParser" in next(iter(source.documents(argparse)))


def test_undecodable_library_files_are_skipped_and_counted(tmp_path):
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "more.py").write_text("y = 2\n")
    source = StdlibSource(tmp_path)
    assert [file.name for file in source.files()] == ["good.py"]
    assert source.skipped == 1


def test_an_unknown_kind_gets_near_names():
    with pytest.raises(ValueError, match="Did you mean jsonl:"):
        open_source("json1:somewhere")
    with pytest.raises(ValueError, match="Did you mean python-stdlib"):
        open_source("python-stdlb")


def test_nothing_found_is_an_error(tmp_path):
    for spec in (f"{tmp_path}/*.txt", str(tmp_path), f"jsonl:{tmp_path}/missing.jsonl"):
        with pytest.raises(ValueError, match="no files there"):
            open_source(spec)


def test_files_without_a_known_suffix_need_a_prefix(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"e\.g\. data\.csv.*text:"):
        open_source(str(tmp_path))


def test_a_folder_of_mixed_kinds_needs_a_choice(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "a.jsonl").write_bytes(lines())
    with pytest.raises(ValueError, match="mixes jsonl and text"):
        open_source(str(tmp_path))


BAD_LINES = {
    "line 2: not JSON": b'{"text": "a"}\n{"text": \n',
    "line 1: a JSON list": b'["text"]\n',
    "line 1: no key 'text'.*Did you mean texts": b'{"texts": "a"}\n',
    "line 1: 'text' holds a int": b'{"text": 3}\n',
    "line 1: not JSON": b'{"text": "\xff"}\n',
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, message):
    (tmp_path / "a.jsonl").write_bytes(BAD_LINES[message])
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        all_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_missing_column_gets_near_names(tmp_path, name):
    one_file(tmp_path / name)
    with pytest.raises(ValueError, match="no column 'txt'.*Did you mean text"):
        all_documents(tmp_path / name, "txt")


def test_a_column_without_text_is_named(tmp_path):
    one_file(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 0: 'other' holds a int"):
        all_documents(tmp_path / "a.parquet", "other")


@pytest.mark.parametrize("name", [name for name in ROW_FILES if name not in ("a.jsonl", "a.ndjson")])
def test_a_truncated_file_is_named(tmp_path, name):
    one_file(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) - 12])
    with pytest.raises(ValueError, match=rf"{name}.*(truncated|damaged)"):
        all_documents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow"])
def test_a_file_of_another_format_is_named(tmp_path, name):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard", reason=DEV)
    (tmp_path / name).write_bytes(b"this is plain text, whatever the suffix says")
    with pytest.raises(ValueError, match=name):
        all_documents(tmp_path / name)


def test_text_that_is_not_utf8_is_named_by_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 at byte 3"):
        all_documents(tmp_path / "a.txt")
