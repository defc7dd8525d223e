"""Preparation by several processes and on several machines: the very bytes of one run by one process."""

import json
import shutil
import sys

import numpy as np
import pytest
from data.corpora import random_texts
from data.sentencepiece_models import trained
from data.test_store import contents
from hypothesis import given
from hypothesis import strategies as st

from fastweight.data import Store, StoreError, merge, prepare, write_weights
from fastweight.data.parts import part_of
from fastweight.data.source_base import SourceFile


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = random_texts(400, 300, seed=2)
    for number, size in enumerate((10, 200, 1, 60, 129)):
        own, texts = texts[:size], texts[size:]
        lines = (json.dumps({"text": text}) + "\n" for text in ["", *own])
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("parts")
    for k in (1, 2, 3):
        prepare(corpus, "bytes", folder / str(k), shard_tokens=5000, part=(k, 3))
    return folder


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.data())
def test_every_file_is_in_one_part_and_no_part_is_empty(sizes, data):
    files = [SourceFile(str(i), str(i), size) for i, size in enumerate(sizes)]
    count = data.draw(st.integers(1, len(files)))
    parts = [part_of(files, k, count) for k in range(1, count + 1)]
    assert all(parts)
    assert [file for part in parts for file in part] == files
    heaviest = max(sum(max(f.size_bytes, 1) for f in part) for part in parts)
    assert heaviest <= sum(max(s, 1) for s in sizes) / count + 2 * max(max(sizes), 1) + len(sizes)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_any_number_of_workers_makes_the_same_store(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(
        sys.modules["fastweight.data.prepare"], "_BATCH_CHARACTERS", 5000
    )  # many batches, so that workers overtake
    for workers in (1, 2):
        prepare(corpus, tokenizer, tmp_path / str(workers), bpe_vocab_size=280, shard_tokens=9000, workers=workers)
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_a_normalising_tokenizer_keeps_original_bytes_through_workers_and_parts(tmp_path, corpus):
    (tmp_path / "sp.model").write_bytes(trained())
    tokenizer = f"sp:{tmp_path / 'sp.model'}"
    prepare(corpus, tokenizer, tmp_path / "whole")
    for k in (1, 2):
        prepare(corpus, tokenizer, tmp_path / str(k), part=(k, 2), workers=k)
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_merged_parts_are_the_store_of_one_run_in_whatever_order_they_come(tmp_path, corpus, parts):
    prepare(corpus, "bytes", tmp_path / "whole", shard_tokens=5000)
    seen = []
    merge([parts / "3", parts / "1", parts / "2"], tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert seen[-1] == (400, 400)
    Store.open(tmp_path / "out").verify()


def test_an_interrupted_merge_begins_again_and_a_foreign_folder_is_left_alone(tmp_path, parts):
    def stop(done, total):
        raise KeyboardInterrupt

    folders = [parts / k for k in "123"]
    with pytest.raises(KeyboardInterrupt):
        merge(folders, tmp_path / "out", stop)
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path / "out")
    merge(folders, tmp_path / "out")
    with pytest.raises(StoreError, match="finished store already"):
        merge(folders, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="no merge was begun here"):
        merge(folders, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


def test_parts_that_do_not_belong_together_are_refused_by_name(tmp_path, corpus, parts):
    with pytest.raises(StoreError, match=r"part\(s\) 2 missing"):
        merge([parts / "1", parts / "3"], tmp_path / "out")
    with pytest.raises(StoreError, match="both part 1/3"):
        merge([parts / "1", parts / "1", parts / "2"], tmp_path / "out")
    prepare(corpus, "bytes", tmp_path / "two", shard_tokens=5000, part=(2, 2))
    with pytest.raises(StoreError, match="parts of 2 and 3"):
        merge([parts / "1", tmp_path / "two"], tmp_path / "out")
    prepare(corpus, "bytes", tmp_path / "other", shard_tokens=6000, part=(2, 3))
    with pytest.raises(StoreError, match="shard_tokens: 5000 and 6000"):
        merge([parts / "1", tmp_path / "other", parts / "3"], tmp_path / "out")
    prepare(corpus, "bytes", tmp_path / "whole")
    with pytest.raises(StoreError, match="not a part"):
        merge([tmp_path / "whole"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_impossible_parts_and_workers_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="K in 1..N, got 4/3"):
        prepare(corpus, "bytes", tmp_path / "out", part=(4, 3))
    with pytest.raises(ValueError, match="9 parts of 5 file"):
        prepare(corpus, "bytes", tmp_path / "out", part=(1, 9))
    with pytest.raises(ValueError, match="would train a bpe tokenizer of its own"):
        prepare(corpus, "bpe", tmp_path / "out", part=(1, 2))
    with pytest.raises(ValueError, match="workers must be at least 1"):
        prepare(corpus, "bytes", tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_part_continues_after_an_interruption_with_other_workers(tmp_path, corpus, parts, monkeypatch):
    monkeypatch.setattr(sys.modules["fastweight.data.prepare"], "_BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(sys.modules["fastweight.data.prepare"], "_COMMIT_SECONDS", 0.0)
    calls = []

    def stop(report):
        calls.append(report)
        if len(calls) == 4:
            raise KeyboardInterrupt

    arguments = {"shard_tokens": 5000, "part": (2, 3)}
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, "bytes", tmp_path / "out", workers=2, progress=stop, **arguments)
    prepare(corpus, "bytes", tmp_path / "out", workers=1, **arguments)
    assert contents(tmp_path / "out") == contents(parts / "2")
    shutil.rmtree(tmp_path / "out")


def weigh_all(folder, name="w", **options):
    """Weights that follow from a document's tokens alone, so that they are the same in whatever store it lies."""
    split = Store.open(folder).split("train")
    write_weights(folder, name, lambda numbers: (split.document(n)[0][1:] % 16 / 8 for n in numbers), **options)


def test_weights_of_merged_parts_are_those_of_the_whole(tmp_path, corpus, parts):
    prepare(corpus, "bytes", tmp_path / "whole", shard_tokens=5000)
    for folder in (tmp_path / "whole", *(shutil.copytree(parts / k, tmp_path / k) for k in "123")):
        weigh_all(folder, made_by={"rule": "sixteenths"})
    merge([tmp_path / k for k in "312"], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(Store.open(tmp_path / "whole").manifest["weights"]["w"]["shards"]) > 1


def test_weights_made_in_different_ways_are_joined_and_name_all_of_them(tmp_path, parts):
    for k in "123":
        weigh_all(shutil.copytree(parts / k, tmp_path / k), made_by={"model": k})
    merge([tmp_path / k for k in "312"], tmp_path / "out")
    assert Store.open(tmp_path / "out").manifest["weights"]["w"]["made_by"] == {"parts": [{"model": k} for k in "123"]}
    Store.open(tmp_path / "out").verify()


def test_weights_that_a_part_lacks_or_has_otherwise_are_refused_by_name(tmp_path, parts):
    folders = [shutil.copytree(parts / k, tmp_path / k) for k in "123"]
    weigh_all(folders[0])
    weigh_all(folders[1])
    with pytest.raises(StoreError, match=r"/3: no weights 'w', which other parts have"):
        merge(folders, tmp_path / "out")
    write_weights(folders[2], "w", lambda numbers: (np.ones(n) for n in _targets(folders[2], numbers)), dtype="uint8")
    with pytest.raises(StoreError, match="weights 'w' differ in split or dtype"):
        merge(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _targets(folder, numbers):
    split = Store.open(folder).split("train")
    return [len(split.document(n)[0]) - 1 for n in numbers]
