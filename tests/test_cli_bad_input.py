"""Bad input through the command line: exit code 2, nothing on stdout, and an error that names what is wrong."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_model

from fastweight import cli
from fastweight.commands.models import find_model
from fastweight.data import ByteTokenizer
from fastweight.data.locks import exclusive

RUN = ("--data.seq-len", "16", "--data.batch-size", "2", "--schedule.warmup-steps", "0", "--log.heldout-every", "0")


def arguments(*parts) -> list[str]:
    return [str(part) for part in parts]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with texts, their store, a model, a run of two steps, and a state of the model."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(f"Document number {i}. " * (5 + i))
    tiny_model().save(folder / "model")
    ByteTokenizer().save(folder / "model" / "tokenizer")
    commands = [
        ("data", "prepare", "--source", folder / "texts", "--out", folder / "store", "--heldout-fraction", "0.3"),
        ("train", "tiny-delta", "--data.store", folder / "store", "--out", folder / "run", "--steps", "2", *RUN),
        ("generate", folder / "model", "--prompt", "x", "--max-tokens", "2", "--state-out", folder / "state"),
    ]
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments(*command))
    return folder


@pytest.fixture
def folder(good, tmp_path, monkeypatch) -> Path:
    """A copy of it to be damaged, as the working directory."""
    shutil.copytree(good, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def cut(name: str) -> None:
    data = next(Path().glob(name)).read_bytes()
    next(Path().glob(name)).write_bytes(data[:-20])


def flip(name: str) -> None:
    path = next(Path().glob(name))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit(**changes) -> None:
    """Change the config of the model's first mixer."""
    path = Path("model/config.json")
    record = json.loads(path.read_text())
    record["config"]["blocks"][0]["mixer"].update(changes)
    path.write_text(json.dumps(record))


EVAL, GENERATE = ("eval", "model", "store"), ("generate", "model", "--prompt", "a", "--state-in", "state")
TRAIN = ("train", "tiny-delta", "--data.store", "store", "--out", "new", "--steps", "2", *RUN)
TOKENS = "store/train/tokens*.bin"
WEIGHTS = "model/model.safetensors"
# name: (damage, command, what the error says)
CASES = {
    "mixer": (lambda: edit(kind="detla"), EVAL, "unknown mixer 'detla'. Did you mean delta"),
    "key": (lambda: edit(heads=2), EVAL, "unknown key 'heads'"),
    "type": (lambda: edit(num_heads="2"), EVAL, "num_heads must be int, got str '2'"),
    "other config": (lambda: edit(norm_eps=0.5), EVAL, "not the one that model.safetensors was saved with"),
    "shape": (lambda: edit(num_heads=4), EVAL, "needs"),
    "preset": (lambda: None, (*TRAIN, "--model.preset", "tiny-detla"), "unknown preset 'tiny-detla'. Did you mean"),
    "preset key": (lambda: None, (*TRAIN, "--model.changes", "heads", "3"), "unknown key 'heads'"),
    "cut weights": (lambda: cut(WEIGHTS), EVAL, "model.safetensors is truncated or damaged"),
    "flipped weights": (lambda: flip(WEIGHTS), EVAL, "model.safetensors is damaged"),
    "cut state": (lambda: cut("state"), GENERATE, "state is truncated or damaged"),
    "flipped state": (lambda: flip("state"), GENERATE, "state is damaged"),
    "state of other weights": (lambda: tiny_model(seed=3).save("model"), GENERATE, "was made by other weights"),
    "cut store": (lambda: cut(TOKENS), EVAL, "tokens-00000.bin"),
    "cut store in training": (lambda: cut(TOKENS), TRAIN, "tokens-00000.bin"),
    "flipped store": (lambda: flip(TOKENS), ("data", "verify", "store"), "tokens-00000.bin"),
    "cut manifest": (lambda: cut("store/manifest.json"), EVAL, "manifest.json"),
    "cut checkpoint": (
        lambda: cut("run/checkpoints/*2/model.safetensors"), ("train", "--resume", "run"), "truncated?"),
    "flipped checkpoint": (
        lambda: flip("run/checkpoints/*2/optimizer.safetensors"), ("train", "--resume", "run"), "checksum differs"),
    "empty corpus": (
        lambda: Path("none.txt").write_text(""), ("data", "prepare", "--source", "none.txt", "--out", "new"),
        "not one document with text"),
    "empty text": (lambda: Path("none.txt").write_text(""), ("eval", "model", "none.txt"), "nothing to score"),
    "no store": (lambda: shutil.rmtree("store"), TRAIN, "store"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_code_2_and_is_named(folder, capsys, case):
    damage, command, message = CASES[case]
    damage()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments(*command))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    error = captured.err[captured.err.index("fastweight: error: ") :]
    assert message in error


def test_a_full_disk_ends_with_code_2_and_the_last_good_state_stays(folder, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = Path("state").read_bytes()
    monkeypatch.setattr("fastweight.tensor_files.save_file", full)
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments(*GENERATE, "--max-tokens", "1", "--state-out", "state"))
    assert "What was there before is untouched" in capsys.readouterr().err
    assert Path("state").read_bytes() == before


def test_an_unfinished_run_of_a_part_of_a_model_is_no_model_folder(tmp_path):
    for folder in ("base", "checkpoints"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="unfinished run that trains a part of a model"):
        find_model(tmp_path)


def test_a_folder_that_another_process_writes_is_no_mistake_of_the_library(folder, capsys):
    new = ("data", "prepare", "--source", "texts", "--out", "new")
    with exclusive(Path("new/.lock")), pytest.raises(SystemExit, match="2"):
        cli.main(arguments(*new))
    error = capsys.readouterr().err
    assert "another process is writing here. Wait for it or stop it." in error
    assert "Traceback" not in error
