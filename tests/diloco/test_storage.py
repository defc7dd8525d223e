"""The folder: whole objects or none, a limited number of attempts, and errors that say what failed."""

import os
import stat

import pytest

from fastweight.diloco import Storage, StorageError
from fastweight.diloco.simulate import memory_folder


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/run"
    else:
        with memory_folder() as url:
            yield url


def test_what_was_written_is_read_and_listed(url):
    storage = Storage(url)
    storage.write("a/b/one", b"1")
    storage.write("a/two", b"22")
    storage.write("a/two", b"3")
    assert (storage.read("a/b/one"), storage.read("a/two")) == (b"1", b"3")
    assert storage.names("a") == ["b", "two"]
    assert storage.names("nowhere") == []
    storage.remove("a/two")
    storage.remove("a/two")
    assert storage.read_if_there("a/two") is None


def test_an_object_is_created_once(url):
    storage = Storage(url)
    assert storage.create("log/1", b"first")
    assert not Storage(url).create("log/1", b"second")
    assert storage.read("log/1") == b"first"


def test_no_more_is_read_than_allowed(url):
    storage = Storage(url)
    storage.write("x", b"0123456789")
    assert storage.read("x", 10) == b"0123456789"
    with pytest.raises(ValueError, match="longer than the 9 bytes"):
        storage.read("x", 9)


def test_bytes_that_move_are_counted(url):
    storage = Storage(url)
    storage.write("x", b"0123456789")
    storage.read("x")
    storage.read("x")
    assert (storage.bytes_written, storage.bytes_read) == (10, 20)


def test_no_temporary_file_is_left_or_listed(tmp_path):
    storage = Storage(str(tmp_path))
    storage.create("a/x", b"1")
    storage.create("a/x", b"1")
    storage.write("a/x", b"2")
    (tmp_path / "a" / ".half.tmp").write_bytes(b"")
    assert storage.names("a") == ["x"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".half.tmp", "x"]


def flaky(storage, failures, error):
    """Let the first operations of `storage` fail; returns the list of pauses made."""
    left, real = [failures], storage.fs.cat_file

    def cat_file(*arguments, **options):
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return real(*arguments, **options)

    storage.fs = type("Flaky", (), {"cat_file": staticmethod(cat_file)})()


def test_what_fails_for_a_while_is_tried_again_with_longer_pauses(tmp_path):
    pauses = []
    storage = Storage(str(tmp_path), sleep=pauses.append)
    storage.write("x", b"1")
    flaky(storage, 3, ConnectionResetError("reset"))
    assert storage.read("x") == b"1"
    assert pauses == [0.2, 0.4, 0.8]


def test_after_five_attempts_the_storage_is_said_to_be_unreachable(tmp_path):
    storage = Storage(str(tmp_path), sleep=lambda seconds: None)
    storage.write("x", b"1")
    flaky(storage, 5, ConnectionResetError("reset"))
    with pytest.raises(StorageError, match=r"could not read x \(5 attempt\(s\)\): ConnectionResetError"):
        storage.read("x")


def test_a_refusal_is_not_tried_again(tmp_path):
    pauses = []
    storage = Storage(str(tmp_path), sleep=pauses.append)
    flaky(storage, 1, PermissionError("no"))
    with pytest.raises(StorageError, match="PermissionError"):
        storage.read("x")
    assert pauses == []


def test_a_read_only_folder_is_named_at_once(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    pauses = []
    with pytest.raises(StorageError, match="could not write log/probe-.*Read-only"):
        Storage(str(tmp_path), sleep=pauses.append).check_writable("log")
    assert pauses == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named_at_once(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StorageError, match="could not write"):
        Storage(str(tmp_path / "run")).check_writable("log")


def test_an_unknown_kind_of_storage_is_refused():
    with pytest.raises(ValueError, match="storage 'nope://x'"):
        Storage("nope://x")
