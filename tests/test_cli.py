"""The command line as a user meets it: what goes to stdout, what to stderr, and the exit code."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from fastweight import cli
from fastweight.data import ByteTokenizer
from fastweight.model import Model, load

TEXTS = {f"text{i}.txt": f"Document number {i}. " * (5 + i) + "Ünïcödé." for i in range(12)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of texts, the token store made of them, and a model with its tokenizer."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "texts").mkdir()
    for name, text in TEXTS.items():
        (folder / "texts" / name).write_text(text, encoding="utf-8")
    tiny_model().save(folder / "model")
    ByteTokenizer().save(folder / "model" / "tokenizer")
    tiny_model(seed=1).save(folder / "other")
    prepare = ["data", "prepare", "--source", str(folder / "texts"), "--out", str(folder / "store")]
    with pytest.raises(SystemExit, match="0"):
        cli.main([*prepare, "--heldout-fraction", "0.3"])
    return folder


@pytest.fixture
def fastweight(capsys, monkeypatch):
    """Run the program in this process: (exit code, stdout, stderr)."""

    def run(*arguments, stdin=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


def last_line(out):
    return json.loads(out.strip().split("\n")[-1])


# The shell.


def test_the_help_of_the_program_loads_neither_torch_nor_tyro():
    code = "import sys; from fastweight.cli import usage; usage(); print({'torch', 'tyro', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_python_m_fastweight_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "fastweight", "evel"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastweight: error: unknown command 'evel'. Did you mean eval? " + (
        "`fastweight --help` describes them.\n"
    )


def test_the_help_names_every_command(fastweight):
    code, out, _ = fastweight("--help")
    assert code == 0
    assert [name for name in cli.COMMANDS if f"\n  {name} " not in out] == []


@pytest.mark.parametrize(
    "command",
    [[name] for name in cli.COMMANDS]
    + [["data", name] for name in ("prepare", "verify", "info")]
    + [["train", "tiny-delta"]],
    ids=" ".join,
)
def test_every_command_has_a_help_with_examples(fastweight, command):
    code, out, _ = fastweight(*command, "--help")
    examples = out.partition("examples:\n")[2].split("\n")
    assert code == 0
    assert examples[0].strip().startswith(("fastweight", "cat ")), out


def test_a_wrong_option_ends_with_code_2_and_the_right_one(fastweight):
    code, out, err = fastweight("eval", "model", "data", "--seq-ln", "3")
    assert (code, out) == (2, "")
    assert "--seq-len" in err


def test_no_arguments_show_the_help_and_fail(fastweight):
    code, out, _ = fastweight()
    assert code == 2
    assert out.startswith("usage:")


def test_a_user_error_is_one_line_without_a_traceback(fastweight):
    code, out, err = fastweight("eval", "no-such-model", "data")
    assert (code, out) == (2, "")
    assert err.startswith("fastweight: error: model no-such-model does not exist")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback_of_a_user_error(fastweight):
    code, _, err = fastweight("eval", "no-such-model", "data", "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize(("error", "code", "words"), [
    (KeyboardInterrupt(), 130, ""),
    (OSError(28, "No space left on device"), 2, "fastweight: error: [Errno 28] No space left on device\n"),
    (ImportError("pyarrow is missing"), 2, "fastweight: error: pyarrow is missing\n"),
])  # fmt: skip
def test_how_the_program_ends(fastweight, monkeypatch, error, code, words):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    assert fastweight("doctor") == (code, "", words)


@pytest.mark.parametrize(
    ("allocate", "named"),
    [
        (lambda: torch.empty(10**15), "4000000000000000 bytes"),
        (lambda: np.empty(10**15), "PiB"),
        (lambda: bytearray(10**15), "no more could be had"),
    ],
    ids=["torch", "numpy", "python"],
)
def test_too_little_memory_is_no_mistake_of_the_library(fastweight, monkeypatch, allocate, named):
    monkeypatch.setattr(cli, "run", lambda arguments: allocate())
    code, _, err = fastweight("doctor")
    assert code == 2
    assert err.startswith("fastweight: error: out of memory (")
    assert err.count("\n") == 1
    assert named in err
    assert "Lower the batch size" in err


def test_a_mistake_of_the_library_shows_its_traceback_and_code_1(fastweight, monkeypatch):
    def fail(arguments):
        raise KeyError("inner")

    monkeypatch.setattr(cli, "run", fail)
    code, _, err = fastweight("doctor")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("this is a mistake in fastweight, not in what you asked for.\n")


def test_a_reader_that_goes_away_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastweight", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# data


def test_prepare_reports_the_bytes_of_the_texts(fastweight, folder):
    code, out, _ = fastweight("data", "info", folder / "store")
    splits = last_line(out)["splits"]
    assert code == 0
    assert sum(split["bytes"] for split in splits.values()) == sum(len(text.encode()) for text in TEXTS.values())


def test_verify_accepts_a_good_store_and_names_a_damaged_file(fastweight, folder, tmp_path):
    import shutil

    assert last_line(fastweight("data", "verify", folder / "store")[1])["verified"] is True
    shutil.copytree(folder / "store", tmp_path / "store")
    victim = next((tmp_path / "store" / "train").glob("tokens-*.bin"))
    data = bytearray(victim.read_bytes())
    data[10] ^= 1
    victim.write_bytes(data)
    code, _, err = fastweight("data", "verify", tmp_path / "store")
    assert code == 2
    assert victim.name in err


def test_an_unknown_data_command_names_the_near_one(fastweight):
    code, _, err = fastweight("data", "verfy")
    assert code == 2
    assert "Did you mean verify" in err


# eval


def test_eval_counts_the_bytes_of_the_split_in_every_mode(fastweight, folder):
    code, out, err = fastweight("eval", folder / "model", folder / "store", "--seq-len", "32")
    splits = last_line(fastweight("data", "info", folder / "store")[1])["splits"]
    scores = last_line(out)["scores"]
    assert code == 0
    assert {mode: s["bytes"] for mode, s in scores.items()} == dict.fromkeys(
        ("memory", "frozen", "windows"), splits["heldout"]["bytes"]
    )
    assert "delta_rule: chunked" in err


def test_eval_of_text_files_equals_eval_of_their_store(fastweight, folder):
    of_texts = last_line(fastweight("eval", folder / "model", folder / "texts", "--modes", "memory")[1])
    nats = 0.0
    for split in ("train", "heldout"):
        arguments = ("eval", folder / "model", folder / "store", "--modes", "memory", "--split", split)
        nats += last_line(fastweight(*arguments)[1])["scores"]["memory"]["nats"]
    assert of_texts["scores"]["memory"]["nats"] == pytest.approx(nats, rel=1e-6)


def test_eval_stops_reading_text_at_its_limits(fastweight, folder):
    limits = ("--max-documents", "3", "--max-tokens", "250")
    out = fastweight("eval", folder / "model", folder / "texts", "--modes", "memory", *limits)[1]
    assert last_line(out)["scores"]["memory"]["tokens"] == 250


def test_eval_writes_the_losses_by_position_and_the_picture(fastweight, folder, tmp_path):
    files = ("--json", tmp_path / "eval.json", "--plot", tmp_path / "eval.png")
    out = fastweight("eval", folder / "model", folder / "store", "--modes", "memory", *files)[1]
    written = json.loads((tmp_path / "eval.json").read_text())["scores"]["memory"]
    assert sum(row["tokens"] for row in written["positions"]) == last_line(out)["scores"]["memory"]["tokens"]
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_eval_of_a_store_with_a_larger_vocabulary_is_refused(fastweight, folder, tmp_path):
    tiny_model(vocab_size=100).save(tmp_path / "small")
    code, _, err = fastweight("eval", tmp_path / "small", folder / "store")
    assert code == 2
    assert "tokenizer bytes has 257 ids, the model only 100" in err


def test_a_model_without_tokenizer_asks_for_one(fastweight, folder):
    code, _, err = fastweight("eval", folder / "other", folder / "texts")
    assert code == 2
    assert "--tokenizer bytes" in err


@pytest.mark.parametrize(("option", "message"), [
    (("--device", "cuda:9999"), "device 'cuda:9999'"),
    (("--device", "gpu"), "unknown device 'gpu'. Use auto, cpu, cuda or cuda:0."),
    (("--backend", "chunkd"), "Did you mean chunked?"),
    (("--split", "helout"), "Did you mean heldout?"),
])  # fmt: skip
def test_a_wrong_choice_is_named_with_the_right_ones(fastweight, folder, option, message):
    code, _, err = fastweight("eval", folder / "model", folder / "store", *option)
    assert code == 2
    assert message in err


# generate


def generated(fastweight, folder, *arguments, model="model", stdin=""):
    settings = ("--tokenizer", "bytes", "--seed", "5", "--max-tokens", "20")
    code, out, err = fastweight("generate", folder / model, *settings, *arguments, stdin=stdin)
    assert code == 0, err
    return out


def test_the_prompt_may_come_as_an_option_a_file_or_stdin(fastweight, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon")
    outs = [
        generated(fastweight, folder, "--prompt", "Once upon"),
        generated(fastweight, folder, "--prompt-file", tmp_path / "prompt.txt"),
        generated(fastweight, folder, stdin="Once upon"),
    ]
    assert outs[0] == outs[1] == outs[2] != generated(fastweight, folder, stdin="Twice upon")


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_a_prompt_is_read_byte_for_byte(fastweight, folder, tmp_path, monkeypatch, way):
    """Windows line ends too, as `eval` and `data prepare` read them."""
    data, options = "é\r\nb\r\n".encode(), ["--max-tokens", "0", "--format", "json"]
    (tmp_path / "prompt.txt").write_bytes(data)
    if way == "file":
        _, out, _ = fastweight("generate", folder / "model", "--prompt-file", tmp_path / "prompt.txt", *options)
    else:
        monkeypatch.setattr(io, "StringIO", lambda text: io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        _, out, _ = fastweight("generate", folder / "model", *options)
    assert last_line(out)["prompt_tokens"] == 1 + len(data)


def test_a_model_with_more_rows_than_its_tokenizer_has_ids_writes_only_ids_of_the_tokenizer(fastweight, tmp_path):
    Model.from_preset("tiny-window", vocab_size=4000).save(tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer")
    code, out, _ = fastweight(
        "generate", tmp_path, "--prompt", "x", "--seed", "1", "--max-tokens", "9", "--format", "json"
    )
    assert code == 0
    assert last_line(out)["generated_tokens"] > 0


def test_stdout_gets_the_text_and_nothing_else(fastweight, folder):
    record = json.loads(generated(fastweight, folder, "--prompt", "Once", "--format", "json"))
    assert generated(fastweight, folder, "--prompt", "Once") == record["text"] + "\n"


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_reading_in_two_runs_equals_one_run(fastweight, folder, tmp_path, temperature):
    want = generated(fastweight, folder, "--prompt", "First half, second half", "--temperature", temperature)
    reading = ("--prompt", "First half,", "--max-tokens", "0", "--state-out", tmp_path / "s")
    assert generated(fastweight, folder, *reading) == ""
    going_on = ("--state-in", tmp_path / "s", "--prompt", " second half", "--temperature", temperature)
    assert generated(fastweight, folder, *going_on) == want


def test_a_state_of_another_model_is_refused(fastweight, folder, tmp_path):
    generated(fastweight, folder, "--prompt", "x", "--state-out", tmp_path / "s")
    arguments = ("--tokenizer", "bytes", "--state-in", tmp_path / "s", "--prompt", "y")
    code, out, err = fastweight("generate", folder / "other", *arguments)
    assert (code, out) == (2, "")
    assert "was made by other weights" in err


def test_state_files_have_the_same_size_after_short_and_long_texts(fastweight, folder, tmp_path):
    for name, length in (("short", 1), ("long", 3000)):
        reading = ("--prompt", "x" * length, "--max-tokens", "0", "--state-out", tmp_path / name)
        generated(fastweight, folder, *reading)
    # The header holds the last token and the position as numbers, nothing that grows.
    assert (tmp_path / "short").stat().st_size == (tmp_path / "long").stat().st_size


def test_two_prompts_are_refused(fastweight, folder, tmp_path):
    code, _, err = fastweight("generate", folder / "model", "--prompt", "a", "--prompt-file", tmp_path / "b")
    assert code == 2
    assert "give one" in err


def test_a_prompt_file_that_is_not_text_is_refused(fastweight, folder, tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    code, _, err = fastweight("generate", folder / "model", "--prompt-file", tmp_path / "b")
    assert code == 2
    assert "is not UTF-8 text" in err


def test_ctrl_c_ends_the_text_and_still_keeps_the_state(fastweight, folder, tmp_path, monkeypatch):
    from fastweight.generate import Generation

    after, steps = Generation.__next__, []

    def interrupted(self):
        steps.append(1)
        if len(steps) > 5:
            raise KeyboardInterrupt
        return after(self)

    monkeypatch.setattr(Generation, "__next__", interrupted)
    # A seed: one draw in 257 ends the text before it is interrupted.
    seeded = ("--seed", "1", "--state-out", tmp_path / "s")
    code, _, err = fastweight("generate", folder / "model", "--prompt", "x", *seeded)
    assert code == 130
    assert (tmp_path / "s").is_file()
    assert "5 tokens in" in err


# train, presets, import, export, doctor


def test_a_trained_run_can_be_scored_and_sampled_by_its_folder(fastweight, folder, tmp_path):
    model = ("--model.folder", folder / "model", "--model.preset", "")
    data = ("--data.store", folder / "store", "--data.seq-len", "16", "--data.batch-size", "2")
    short = ("--steps", "2", "--schedule.warmup-steps", "0", "--log.heldout-every", "0")
    code, out, err = fastweight("train", "tiny-delta", *model, *data, *short, "--out", tmp_path / "run")
    assert code == 0, err
    assert last_line(out)["step"] == 2
    code, out, _ = fastweight("eval", tmp_path / "run", folder / "store", "--modes", "memory")
    assert (code, last_line(out)["model"]) == (0, str(tmp_path / "run" / "model"))
    code, out, _ = fastweight("generate", tmp_path / "run", "--prompt", "Doc", "--max-tokens", "5", "--format", "json")
    assert (code, last_line(out)["generated_tokens"]) == (0, 5)


def test_a_run_whose_store_has_moved_is_resumed_with_the_new_place(fastweight, folder, tmp_path):
    shutil.copytree(folder / "store", tmp_path / "before")
    data = ("--data.store", tmp_path / "before", "--data.seq-len", "16", "--data.batch-size", "2")
    short = ("--steps", "2", "--schedule.warmup-steps", "0", "--log.heldout-every", "0", "--log.checkpoint-every", "1")
    _, whole, _ = fastweight("train", "tiny-window", *data, *short, "--out", tmp_path / "run")
    (tmp_path / "before").rename(tmp_path / "after")
    resume = ("train", "--resume", tmp_path / "run", "--checkpoint", "step-000001")
    assert fastweight(*resume)[0] == 2
    code, out, err = fastweight(*resume, "--store", tmp_path / "after")
    assert code == 0, err
    assert last_line(out)["loss_nats"] == last_line(whole)["loss_nats"]


def test_a_run_starts_from_the_model_of_another_run(fastweight, folder, tmp_path):
    data = ("--data.store", folder / "store", "--data.seq-len", "32", "--data.batch-size", "2", "--device", "cpu")
    short = ("--steps", "1", "--schedule.warmup-steps", "0", "--schedule.decay-fraction", "0", *data)
    assert fastweight("train", "tiny-window", *short, "--out", tmp_path / "first")[0] == 0
    first = ("--model.preset", "", "--model.folder", tmp_path / "first")
    code, _, err = fastweight("train", "tiny-window", *first, *short, "--out", tmp_path / "second")
    assert code == 0, err
    start = load(tmp_path / "second" / "checkpoints" / "step-000000")
    assert torch.equal(start.embedding.weight, load(tmp_path / "first" / "model").embedding.weight)
    of_run = ("--train.model.preset", "", "--train.model.folder", tmp_path / "first")
    place = ("--folder", tmp_path / "meeting", "--store", folder / "store")
    code, _, err = fastweight("diloco", "init", "tiny-window", *of_run, *place)
    assert code == 0, err


def test_a_run_that_has_only_checkpoints_is_read_from_the_newest(folder, tmp_path):
    from fastweight.commands.models import find_model

    tiny_model().save(tmp_path / "checkpoints" / "step-000004")
    (tmp_path / "latest").write_text("step-000004\n")
    assert find_model(tmp_path) == tmp_path / "checkpoints" / "step-000004"


def test_a_folder_without_a_model_says_what_it_holds(fastweight, folder):
    code, _, err = fastweight("eval", folder / "store", folder / "store")
    assert code == 2
    assert "is no model folder" in err
    assert "manifest.json" in err


@pytest.mark.parametrize(("arguments", "message"), [
    (["tiny-detla"], "Did you mean tiny-delta"),
    (["--out", "x", "tiny-delta"], "the recipe's name goes before the options"),
    (["tiny-delta", "--out", "x"], "name a token store: --data.store DIR"),
    (["tiny-delta", "--out", "x", "--steps", "0", "--data.store", "x"], "steps must be at least 1, got 0"),
    (["--resume", "no-such-run"], "holds no run to resume"),
])  # fmt: skip
def test_a_training_command_that_cannot_start_says_why(fastweight, arguments, message):
    code, out, err = fastweight("train", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_list_of_recipes_is_complete(fastweight):
    from fastweight.recipes import recipe_names

    assert last_line(fastweight("train", "--list")[1]) == {"recipes": recipe_names()}


def test_doctor_knows_every_op(fastweight):
    from fastweight.ops import dispatch

    assert sorted(last_line(fastweight("doctor")[1])["backends"]["cpu bfloat16"]) == dispatch.ops()


def test_doctor_and_the_header_say_why_the_fastest_backend_does_not_run(monkeypatch):
    import torch

    from fastweight.backends import explain_choice
    from fastweight.doctor import backends_on
    from fastweight.ops import dispatch

    monkeypatch.setattr(dispatch, "_OPS", {})
    dispatch.register_backend("op", "naive")(print)
    dispatch.register_backend(
        "op", "triton", lambda x: "needs CUDA tensors, got cpu." if x.device.type == "cpu" else None
    )(print)
    refusals = {"triton": "needs CUDA tensors, got cpu.", "naive": None}
    want = {"auto": "naive", "auto_one_token": "naive", "refusals": refusals, "accuracy": {}}
    assert backends_on(torch.device("cpu"), torch.float32) == {"op": want}
    assert explain_choice("op", torch.zeros(1)) == "naive (triton needs CUDA tensors, got cpu)"
    assert explain_choice("op", torch.zeros(1), "naive") == "naive (asked for)"


@pytest.mark.parametrize("arguments", [["import", "x", "y", "--format", "lacd"], ["export", "x", "y", "--to", "lacd"]])
def test_import_and_export_name_what_is_missing(fastweight, arguments):
    code, out, err = fastweight(*arguments)
    assert (code, out) == (2, "")
    assert "lacd" in err or "does not exist" in err


def test_an_exported_model_comes_back_with_a_tokenizer_and_scores_the_same(fastweight, folder, tmp_path):
    from fastweight.model import Model
    from fastweight.presets import preset

    Model(preset("tiny-ttt-linear")).save(tmp_path / "model")
    assert fastweight("export", tmp_path / "model", tmp_path / "out", "--to", "ttt-lm")[0] == 0
    arguments = ("import", tmp_path / "out", tmp_path / "back", "--format", "ttt-lm", "--tokenizer", "bytes")
    code, _, err = fastweight(*arguments)
    assert code == 0, err
    limits = (folder / "texts", "--modes", "memory", "--max-tokens", "100")
    back = last_line(fastweight("eval", tmp_path / "back", *limits)[1])
    first = last_line(fastweight("eval", tmp_path / "model", *limits, "--tokenizer", "bytes")[1])
    assert back["scores"]["memory"]["nats"] == first["scores"]["memory"]["nats"]


def test_presets_are_listed_with_their_parameter_counts(fastweight):
    from fastweight.presets import preset_names, preset_parameters

    counts = last_line(fastweight("presets", "--match", "tiny")[1])["presets"]
    assert counts == {name: preset_parameters(name) for name in preset_names() if "tiny" in name}


def test_a_preset_that_does_not_exist_is_answered_with_the_names(fastweight):
    code, out, err = fastweight("presets", "--match", "gigantic")
    assert (code, out) == (2, "")
    assert "tiny-delta" in err


def test_eval_with_learners_reports_each_in_each_mode_and_the_difference(fastweight, folder):
    learn = ("--learn", "sgd", "in-place", "--learn-modes", "exact", "cached", "--learn-chunk", "16")
    arguments = ("eval", folder / "model", folder / "store", "--modes", "memory", "--seq-len", "64", *learn)
    result = last_line(fastweight(*arguments)[1])
    assert list(result["scores"]) == ["memory", "sgd exact", "sgd cached", "in-place exact", "in-place cached"]
    assert len({scored["tokens"] for scored in result["scores"].values()}) == 1
    for kind in ("sgd", "in-place"):
        exact, cached = (result["scores"][f"{kind} {mode}"]["bits_per_byte"] for mode in ("exact", "cached"))
        assert result["exact_minus_cached"][kind] == exact - cached


@pytest.mark.parametrize(
    "learn", [("sgd",), ("lora", "--learn-modes", "exact"), ("sgd", "lora", "--learn-modes", "exact", "cached")]
)
def test_eval_refuses_more_than_one_epoch_where_tokens_are_read_once(fastweight, learn):
    code, _, err = fastweight("eval", "no-such-model", "no-such-store", "--learn", *learn, "--learn-epochs", "2")
    assert code == 2
    assert "--learn-epochs 2 is for --learn sgd with --learn-modes exact alone" in err


def test_help_keeps_the_lines_of_a_list_apart_from_the_sentence_after_it(fastweight):
    _, out, _ = fastweight("eval", "--help")
    assert any(line.startswith("With --learn, weights learn too") for line in out.splitlines())
    _, out, _ = fastweight("golf", "train", "--help")
    assert "golf train RECIPE --help` shows its options" in out
