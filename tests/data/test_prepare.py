"""Preparing: the right documents on the right side, and no kill, full disk or changed option that goes unnoticed."""

import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from data.corpora import random_texts
from data.test_store import contents
from data.test_tokenizers import word_pieces

from fastweight.data import BPETokenizer, ByteTokenizer, Store, StoreError, prepare
from fastweight.data.locks import FolderInUseError
from fastweight.data.prepare import is_heldout

TEXTS = random_texts(300, 200, seed=1)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for part in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[part::3])
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return str(folder)


IN_ORDER = [text for part in range(3) for text in TEXTS[part::3]]


def texts_of(store, split):
    part = store.split(split)
    return [store.tokenizer.decode(part.document(i)[0]) for i in range(part.num_documents)]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_exactly_one_split_in_source_order(tmp_path, corpus, tokenizer):
    prepare(corpus, tokenizer, tmp_path / "out", heldout_fraction=0.3, bpe_vocab_size=280)
    store = Store.open(tmp_path / "out")
    assert texts_of(store, "train") == [text for text in IN_ORDER if not is_heldout(text, 0.3)]
    assert texts_of(store, "heldout") == [text for text in IN_ORDER if is_heldout(text, 0.3)]


def test_the_byte_total_is_the_bytes_of_the_texts(tmp_path, corpus):
    manifest = prepare(corpus, "bpe", tmp_path / "out", bpe_vocab_size=280)
    total = sum(split["num_bytes"] for split in manifest["splits"].values())
    assert total == sum(len(text.encode()) for text in TEXTS)


def test_the_held_out_share_is_near_the_fraction_asked_for():
    share = sum(is_heldout(f"document {i}", 0.2) for i in range(5000)) / 5000
    assert abs(share - 0.2) < 0.03  # 5 standard deviations of a binomial with 5000 draws


def test_a_larger_fraction_only_adds_to_the_held_out_documents():
    texts = [f"document {i}" for i in range(500)]
    small, large = ({text for text in texts if is_heldout(text, f)} for f in (0.1, 0.4))
    assert small < large


def test_nothing_is_held_out_at_fraction_zero(tmp_path, corpus):
    manifest = prepare(corpus, "bytes", tmp_path / "out", heldout_fraction=0.0)
    assert manifest["splits"]["heldout"]["num_documents"] == 0


def test_held_out_documents_do_not_train_the_tokenizer(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rare = next(text for text in (f"{i} zqzqzqzq" * 50 for i in range(99)) if is_heldout(text, 0.5))
    common = [text for text in (f"{i} common words" * 5 for i in range(99)) if not is_heldout(text, 0.5)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [rare, *common]))
    prepare(str(folder), "bpe", tmp_path / "out", heldout_fraction=0.5, bpe_vocab_size=265)
    assert not any(b"zq" in piece for piece in Store.open(tmp_path / "out").tokenizer.token_bytes)


def test_empty_documents_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n{"text": null}\n')
    manifest = prepare(str(tmp_path / "a.jsonl"), "bytes", tmp_path / "out")
    assert manifest["passed_over"]["documents_empty"] == 2
    assert sum(split["num_documents"] for split in manifest["splits"].values()) == 1


def test_documents_that_a_tokenizer_cannot_hold_are_left_out_and_counted(tmp_path):
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "   "}\n{"text": "the fox"}\n{"text": "the dog"}\n')
    manifest = prepare(str(tmp_path / "a.jsonl"), str(tmp_path / "tokenizer.json"), tmp_path / "out")
    assert manifest["passed_over"]["documents_unencodable"] == 1
    assert sum(split["num_documents"] for split in manifest["splits"].values()) == 2


def test_the_manifest_lists_the_files_and_the_last_report_is_complete(tmp_path, corpus):
    reports = []
    manifest = prepare(corpus, "bytes", tmp_path / "out", progress=reports.append)
    assert [file["name"] for file in manifest["files"]] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert (reports[-1].num_files_done, reports[-1].num_files, reports[-1].num_documents) == (3, 3, 300)
    assert reports[-1].num_tokens == sum(len(text) + 1 for text in TEXTS)


def test_a_finished_store_is_returned_as_it_is(tmp_path, corpus):
    first = prepare(corpus, "bytes", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    assert prepare(corpus, "bytes", tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == before


CHANGES = {
    "tokenizer": {"tokenizer": "bpe"},
    "heldout_fraction": {"heldout_fraction": 0.5},
    "shard_tokens": {"shard_tokens": 999},
    "text_field": {"text_field": "body"},
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("option", CHANGES)
def test_a_changed_option_is_refused_by_name(tmp_path, corpus, option, finished):
    begin(corpus, tmp_path / "out", finished)
    with pytest.raises(StoreError, match=f"{option} was .*new folder"):
        prepare(**{"source": corpus, "tokenizer": "bytes", "out": tmp_path / "out", **CHANGES[option]})


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_source_is_refused(tmp_path, corpus, finished):
    begin(corpus, tmp_path / "out", finished)
    (Path(corpus) / "3.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(StoreError, match="source_hash was"):
        prepare(corpus, "bytes", tmp_path / "out")


def test_a_tokenizer_file_that_changed_is_refused(tmp_path, corpus):
    BPETokenizer.train(TEXTS, 260).save(tmp_path / "t")
    with pytest.raises(Stopped):
        prepare(corpus, str(tmp_path / "t"), tmp_path / "out", progress=stop)
    BPETokenizer.train(TEXTS, 261).save(tmp_path / "t")
    with pytest.raises(StoreError, match="tokenizer was '"):
        prepare(corpus, str(tmp_path / "t"), tmp_path / "out")


def test_a_tokenizer_trained_before_the_interruption_must_still_be_there(tmp_path, corpus):
    with pytest.raises(Stopped):
        prepare(corpus, "bpe", tmp_path / "out", bpe_vocab_size=270, progress=stop)
    ByteTokenizer().save(tmp_path / "out" / "tokenizer")
    with pytest.raises(StoreError, match="changed since the preparation began"):
        prepare(corpus, "bpe", tmp_path / "out", bpe_vocab_size=270)


class Stopped(Exception):
    pass


def stop(_report):
    raise Stopped


def begin(corpus, out, finished):
    if finished:
        prepare(corpus, "bytes", out)
    else:
        with pytest.raises(Stopped):
            prepare(corpus, "bytes", out, progress=stop)


KILLER = """
import os, signal, sys
from pathlib import Path
import fastweight.data.prepare, fastweight.data.store_writer as writer
from fastweight.data.prepare import prepare

source, tokenizer, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
module = sys.modules["fastweight.data.prepare"]
module._COMMIT_SECONDS, module._BATCH_CHARACTERS = 0.0, 3000
events, limit = 0, 0

def counted(function):
    def run(*args, **kwargs):
        global events
        events += 1
        if events == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run

for owner, name in [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "open"), (writer._SplitWriter, "add"),
                    (writer, "checksums"), (module, "read_manifest")]:
    setattr(owner, name, counted(getattr(owner, name)))

def run(out, kill_at):
    global limit
    pid = os.fork()
    if pid == 0:
        limit = kill_at
        try:
            prepare(source, tokenizer, out, heldout_fraction=0.3, shard_tokens=4000)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "prepare failed"
    return os.WIFEXITED(status)

kills = 0
for step in (2, 5, 40):                           # at many events early on, at some later ones
    out, kill_at = root / f"killed-{step}", step
    while not run(out, kill_at):
        kills += 1
        kill_at += step                           # later each time, or it would never finish
assert run(root / "whole", 0)
print(kills)
"""


def run_killer(*arguments):
    command = [sys.executable, "-c", KILLER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, corpus):
    done = run_killer(corpus, "bytes", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # the kills did happen
    whole = contents(tmp_path / "whole")
    assert len([name for name in whole if "tokens-" in name]) > 4  # shards were closed in between
    for folder in tmp_path.glob("killed-*"):
        assert contents(folder) == whole
    Store.open(tmp_path / "whole").verify()


def test_killed_from_outside_it_continues_to_the_same_bytes(tmp_path):
    code = (
        "import sys; import fastweight.data.prepare; m = sys.modules['fastweight.data.prepare']; "
        "m._COMMIT_SECONDS = 0.0; m.prepare('python-stdlib', 'bytes', sys.argv[1], shard_tokens=1 << 20)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    progress = tmp_path / "killed" / "progress.json"
    deadline = time.monotonic() + 60
    while not (progress.is_file() and json.loads(progress.read_text())["position"]["document"]):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    prepare("python-stdlib", "bytes", tmp_path / "killed", shard_tokens=1 << 20)
    prepare("python-stdlib", "bytes", tmp_path / "whole", shard_tokens=1 << 20)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@contextmanager
def largest_file(num_bytes):
    """Let the system refuse to write beyond this size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [300, 5000, 20_000, 45_000])
def test_a_refusing_disk_is_a_clean_error_and_costs_nothing(tmp_path, corpus, num_bytes, monkeypatch):
    module = sys.modules["fastweight.data.prepare"]
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 3000)
    out = tmp_path / "out"
    with largest_file(num_bytes), pytest.raises(OSError, match="make room on the disk"):
        prepare(corpus, "bytes", out)
    assert not (out / "manifest.json").exists()
    prepare(corpus, "bytes", out)
    prepare(corpus, "bytes", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_output_that_cannot_be_made_is_a_clean_error(tmp_path, corpus):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="prepare into"):
        prepare(corpus, "bytes", tmp_path / "file" / "out")


def test_two_writers_in_one_folder_are_refused(tmp_path, corpus):
    def again(_report):
        with pytest.raises(FolderInUseError, match="another process is writing"):
            prepare(corpus, "bytes", tmp_path / "out")
        raise Stopped

    with pytest.raises(Stopped):
        prepare(corpus, "bytes", tmp_path / "out", progress=again)


def test_a_source_without_text_is_refused_and_leaves_the_folder_usable(tmp_path, corpus):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="not one document with text"):
        prepare(str(tmp_path / "a.jsonl"), "bytes", tmp_path / "out")
    prepare(corpus, "bytes", tmp_path / "out")
    Store.open(tmp_path / "out").verify()


def test_a_source_without_text_cannot_train_a_tokenizer_and_says_so(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no training document with text in it"):
        prepare(str(tmp_path / "a.jsonl"), "bpe", tmp_path / "out")


def test_an_impossible_fraction_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"heldout_fraction must lie in \[0, 1\), got 1"):
        prepare(corpus, "bytes", tmp_path / "out", heldout_fraction=1)


def test_damaged_progress_is_named(tmp_path, corpus):
    begin(corpus, tmp_path / "out", finished=False)
    (tmp_path / "out" / "progress.json").write_text("{")
    with pytest.raises(StoreError, match=r"progress\.json: damaged"):
        prepare(corpus, "bytes", tmp_path / "out")


def test_recorded_data_that_is_gone_is_named(tmp_path, corpus, monkeypatch):
    module = sys.modules["fastweight.data.prepare"]
    monkeypatch.setattr(module, "_COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 3000)
    seen = []

    def stop_later(report):
        seen.append(report)
        if len(seen) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(corpus, "bytes", tmp_path / "out", progress=stop_later)
    path = tmp_path / "out" / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match="10 bytes, .* were recorded"):
        prepare(corpus, "bytes", tmp_path / "out")
