"""Object storage: the same documents as from files here, found by pattern, and errors that name the URL."""

import gzip
import io
import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.test_store import contents

from fastweight.data import open_source, prepare

TEXTS = ["first", "second é 漢字", "", "last"]


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), table)
    for name, data in {
        "web/b/2.jsonl.gz": gzip.compress(lines),
        "web/a/1.jsonl": lines,
        "web/a/.hidden.jsonl": b"not this",
        "tables/part.parquet": table.getvalue(),
        "cut/1.jsonl.gz": gzip.compress(lines)[:-9],
        "odd/readme.xyz": b"?",
    }.items():
        files.pipe(f"/bucket/{name}", data)
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def documents(spec):
    source = open_source(spec)
    return [(file.name, list(source.documents(file))) for file in source.files()]


@pytest.mark.parametrize("pattern", ["web", "web/", "web/**/*.jsonl*", "web/*/*"])
def test_a_folder_or_pattern_gives_every_file_in_order(bucket, pattern):
    assert documents(f"{bucket}/{pattern}") == [("a/1.jsonl", TEXTS), ("b/2.jsonl.gz", TEXTS)]


def test_tables_and_single_files_are_read(bucket):
    assert documents(f"{bucket}/tables/part.parquet") == [("part.parquet", TEXTS)]
    assert documents(f"text:{bucket}/web/a/1.jsonl")[0][1][0].startswith('{"text"')


def test_a_store_from_a_bucket_holds_what_one_from_files_holds(bucket, tmp_path):
    for name in ("a/1.jsonl", "b/2.jsonl.gz"):
        path = tmp_path / "web" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(fsspec.filesystem("memory").cat(f"/bucket/web/{name}"))
    for out, source in (("remote", f"{bucket}/web"), ("here", str(tmp_path / "web"))):
        prepare(source, "bytes", tmp_path / out)
    remote, here = contents(tmp_path / "remote"), contents(tmp_path / "here")
    assert {k: v for k, v in remote.items() if k != "manifest.json"} == {
        k: v for k, v in here.items() if k != "manifest.json"
    }


def test_a_named_corpus_can_be_read_from_a_copy(bucket):
    assert documents(f"dclm:{bucket}/web/a") == [("1.jsonl", TEXTS)]


def test_what_is_wrong_is_said_with_the_url(bucket):
    with pytest.raises(ValueError, match="no files there"):
        open_source(f"{bucket}/nothing/*.jsonl")
    with pytest.raises(ValueError, match=r"1 file\(s\), e.g. readme.xyz"):
        open_source(f"{bucket}/odd")
    with pytest.raises(ValueError, match="no storage of protocol 's4'"):
        open_source("s4://bucket/web")
    with pytest.raises(ValueError, match="memory://.*1.jsonl.gz: truncated"):
        documents(f"{bucket}/cut")
