"""The commands of the data folder: what they print is what the store or the shards hold."""

import json
import math

import pytest
import torch
from data.corpora import random_texts, write_store

import fastweight
from fastweight import cli
from fastweight.data import ByteTokenizer, Store, StoreWriter


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "store", ByteTokenizer())
    texts = random_texts(12, 300, seed=5)
    for i, text in enumerate([*texts, texts[0]]):
        writer.add("train" if i < 9 else "heldout", *ByteTokenizer().encode(text))
    writer.finish()
    return tmp_path / "store"


def main(arguments):
    """Run the program in this process; return its exit code."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    return exit.value.code or 0


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_export_and_import_report_the_same_counts(store, tmp_path, capsys):
    assert main(["data", "export-shards", str(store), "--out", str(tmp_path / "x"), "--shard-tokens", "500"]) == 0
    exported = last_line(capsys)
    assert (
        main(["data", "import-shards", str(tmp_path / "x"), "--tokenizer", "bytes", "--out", str(tmp_path / "b")]) == 0
    )
    imported = last_line(capsys)
    for split in ("train", "heldout"):
        for quantity in ("documents", "tokens", "bytes"):
            assert exported["splits"][split][f"num_{quantity}"] == imported["splits"][split][quantity]
    assert Store.open(tmp_path / "b").manifest["splits"] == Store.open(store).manifest["splits"]


def test_overlap_finds_the_document_that_is_on_both_sides(store, tmp_path, capsys):
    assert main(["data", "overlap", str(store), "--out", str(tmp_path / "o.json")]) == 0
    found = last_line(capsys)
    assert (found["documents"], found["documents_equal"]) == (4, 1)
    assert json.loads((tmp_path / "o.json").read_text()) == found


def test_overlap_takes_a_second_store(store, tmp_path, capsys):
    write_store(tmp_path / "other", ["nothing alike"], split="heldout")
    assert main(["data", "overlap", str(store), str(tmp_path / "other")]) == 0
    found = last_line(capsys)
    assert (found["documents"], found["documents_equal"], found["scored"]) == (1, 0, str(tmp_path / "other"))


def test_overlap_of_three_stores_is_refused(store, capsys):
    assert main(["data", "overlap", *[str(store)] * 3]) == 2
    assert "one store or two, got 3" in capsys.readouterr().err


def test_a_bad_shard_is_named_on_the_command_line(tmp_path, capsys):
    (tmp_path / "web_val_000000.bin").write_bytes(b"\0" * 1024)
    assert main(["data", "import-shards", str(tmp_path), "--tokenizer", "bytes", "--out", str(tmp_path / "b")]) == 2
    assert "web_val_000000.bin: not a token shard: magic number 0" in capsys.readouterr().err


def test_too_few_held_out_documents_are_named_on_the_command_line(store, tmp_path, capsys):
    main(["data", "export-shards", str(store), "--out", str(tmp_path / "x")])
    arguments = ["--tokenizer", "bytes", "--out", str(tmp_path / "b"), "--expect-heldout-documents", "5"]
    assert main(["data", "import-shards", str(tmp_path / "x"), *arguments]) == 2
    assert "hold 4 documents, 5 were expected" in capsys.readouterr().err


def test_weigh_names_what_it_kept_and_goes_with_a_reference(store, tmp_path, capsys):
    models = [tmp_path / name for name in ("model", "reference")]
    for seed, folder in enumerate(models):
        torch.manual_seed(seed)
        fastweight.Model.from_preset("tiny-delta").save(folder)
    command = ["data", "weigh", str(store), "--by", str(models[0]), "--reference", str(models[1])]
    assert main([*command, "--keep", "0.5", "--window", "40", "--name", "best"]) == 0
    found = last_line(capsys)
    split = Store.open(store).split("train", weights="best")
    lengths = split.document_ends - split.document_starts - 1
    kept = sum(math.ceil(min(40, n - start) / 2) for n in lengths.tolist() for start in range(0, n, 40))
    assert (found["kept"], found["tokens"]) == (kept, int(lengths.sum()))
    assert split.weights(0, split.num_tokens).sum() == kept
    Store.open(store).verify()
    about = Store.open(store).manifest["weights"]["best"]["made_by"]
    assert (about["keep"], about["window"], about["by"]) == (0.5, 40, "excess loss")
    assert len({about["model"], about["reference"]}) == 2
    assert main([*command, "--keep", "0.5", "--name", "best"]) == 2
    assert "has weights 'best' already" in capsys.readouterr().err
