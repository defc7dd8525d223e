"""What a user gets wrong, and goes on from: nothing is bound by a mistake, and nothing is found out after hours."""

import dataclasses
import json
import shutil

import pytest
import torch

from fastweight import cli
from fastweight.conversion import InPlaceRecipe, convert, load_conversion, make_report
from fastweight.train.stages import StageConfig

pytest.importorskip("peft")
pytest.importorskip("transformers")
from tptt.conversions import REPORT, STAGES, make_place, settings, write_text  # needs transformers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    return make_place(tmp_path_factory.mktemp("mistakes"))


def attempt(place, out, **changes):
    said = []
    result = convert(settings(place, **changes), out, quiet=True, say=said.append)
    return result, said


def refused(place, out, match, **changes):
    """The conversion is refused before a stage."""
    with pytest.raises((ValueError, OSError), match=match):
        attempt(place, out, **changes)
    assert not (out / "stages").exists()


def test_a_source_that_cannot_be_read_leaves_nothing_behind(place, tmp_path):
    refused(place, tmp_path / "out", "is a file", source=str(place / "text.jsonl"))
    assert not (tmp_path / "out").exists()


def test_until_a_stage_has_saved_something_every_setting_may_change(place, tmp_path):
    out = tmp_path / "out"
    write_text(tmp_path / "short.jsonl", documents=4)
    refused(place, out, "second longest", data=str(tmp_path / "short.jsonl"))
    shutil.copytree(place / "llama", tmp_path / "other")
    result, _ = attempt(place, out, source=str(tmp_path / "other"), control=False, report=None)
    assert result["model"] == str(out / "model")
    manifest = json.loads((out / "data" / "manifest.json").read_text())
    assert sum(split["num_documents"] for split in manifest["splits"].values()) == 60
    with pytest.raises(ValueError, match=r"begun with other settings \(mag.window: 8 → 1024\)"):
        attempt(place, out, source=str(tmp_path / "other"), mag=dataclasses.replace(settings(place).mag, window=1024))


def test_a_store_that_the_user_gave_outlives_a_change_of_mind(place, tmp_path):
    from fastweight.data import prepare

    out = tmp_path / "out"
    prepare(str(place / "text.jsonl"), str(place / "llama"), out / "data", heldout_fraction=0.2)
    before = (out / "data" / "manifest.json").read_text()
    layers = dataclasses.replace(settings(place).mag, layers="7")
    refused(place, out, "no layer 7", data=str(out / "data"), mag=layers)
    for fraction in (0.1, 0.3):
        refused(place, out, "begun with other choices", heldout_fraction=fraction, mag=layers)
    assert (out / "data" / "manifest.json").read_text() == before


def test_a_folder_of_something_else_is_refused(place, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    refused(place, tmp_path / "out", "holds model, but no conversion.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tune": StageConfig(steps=1, trainable=("foo",))}, "stage c-lora: trainable 'foo' fits no parameter"),
        ({"lora": dataclasses.replace(STAGES.lora, targets=("foo",))}, "stage c-lora: lora: target 'foo'"),
        ({"mag_weight": 0.5, "tune": StageConfig(steps=2, mag_start=0.1)}, "stage c-lora: mag: layers .* learn"),
        ({"lora": dataclasses.replace(STAGES.lora, quantize="nf4")}, "needs a GPU"),
    ],
)
def test_a_mistake_in_the_last_stage_is_found_before_the_first(place, tmp_path, changes, match):
    refused(place, tmp_path / "out", match, stages=dataclasses.replace(STAGES, **changes), report=None)


def test_a_report_that_the_text_is_too_short_for_is_made_shorter_before_training(place, tmp_path):
    report = dataclasses.replace(REPORT, lengths=(16, 4096))
    result, said = attempt(place, tmp_path / "out", report=report, control=False)
    lengths = result["report"]["models"]["converted"]["lengths"]
    assert [row["length"] for row in lengths] == [16]
    assert any("left out: lengths 4,096" in line for line in said)


def test_a_report_that_nothing_is_left_of_stops_the_conversion_before_training(place, tmp_path):
    refused(place, tmp_path / "out", "nothing is left", report=dataclasses.replace(REPORT, lengths=(4096,)))


def test_a_damaged_file_of_the_source_stops_the_conversion_before_training(place, tmp_path):
    source = shutil.copytree(place / "llama", tmp_path / "llama")
    (source / "generation_config.json").write_text('{"do_sample": tr')
    refused(place, tmp_path / "out", "generation_config.json is not JSON", source=str(source))


def test_prompts_without_room_stop_the_conversion_before_training(place, tmp_path):
    refused(place, tmp_path / "out", "passkey", report=dataclasses.replace(REPORT, passkey_lengths=(8,)))


def test_a_model_with_few_positions_gets_a_report_of_shorter_lengths(place, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, **shape)).save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "llama" / name, tmp_path / "gpt2")
    source = str(tmp_path / "gpt2")
    report = dataclasses.replace(REPORT, lengths=(16, 128), speed_lengths=(63, 128))
    result, said = attempt(place, tmp_path / "out", source=source, report=report)
    assert result["report"]["settings"]["lengths"] == [16]
    assert result["report"]["settings"]["speed_lengths"] == []
    assert sum("positions for 64 tokens" in line for line in said) == 2
    longer = dataclasses.replace(STAGES, seq_len=65)
    refused(place, tmp_path / "longer", "positions for 64 tokens", source=source, stages=longer, report=None)


def test_a_tuning_without_adapters_has_no_control(place, tmp_path):
    stages = dataclasses.replace(STAGES, tune=StageConfig(steps=2, trainable=("memory",)))
    result, _ = attempt(place, tmp_path / "out", stages=stages)
    assert set(result["report"]["models"]) == {"backbone", "converted", "window + sinks"}


def test_an_in_place_memory_that_the_stages_never_read_is_refused(place, tmp_path):
    stages = dataclasses.replace(STAGES, transfer=StageConfig())
    chosen = {"recipe": "in-place", "stages": stages, "report": None}
    refused(place, tmp_path / "out", "never be read", in_place=InPlaceRecipe(chunk_size=32), **chosen)
    moved = chosen | {"stages": dataclasses.replace(stages, mag_weight=0.5)}
    refused(place, tmp_path / "out", "weight of linear branches", in_place=InPlaceRecipe(chunk_size=8), **moved)


def test_the_in_place_command_works_without_naming_stage_a(place, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = "--recipe in-place --in-place.chunk-size 8 --heldout-fraction 0.2 --stages.seq-len 32 --no-compare"
    options += (
        " --stages.heldout-tokens 64 --stages.tune.steps 1 --stages.device cpu --no-control --stages.batch-size 2"
    )
    shape = ["--stages.precision", "float32", "--stages.distill.max-seconds", "0", "--stages.micro-batch-size", "0"]
    data = ["--data", str(place / "text.jsonl"), "--out", out]
    assert cli.run(["convert", str(place / "llama"), *data, *options.split(), *shape]) == 0
    captured = capsys.readouterr()
    assert "stage A   left out" in captured.err
    assert set(json.loads(captured.out.splitlines()[-1])["stages"]) == {"c-lora"}
    with pytest.raises(FileNotFoundError, match="has no report yet"):
        cli.run(["report", out])


def test_a_store_beside_data_is_refused_by_the_command(place, tmp_path):
    with pytest.raises(ValueError, match="as --data"):
        cli.run(["convert", str(place / "llama"), "--data", "x", "--out", str(tmp_path / "o"), "--stages.store", "y"])


def test_a_report_of_an_unfinished_conversion_says_how_to_go_on(place, tmp_path):
    refused(place, tmp_path / "out", "nothing is left", report=dataclasses.replace(REPORT, lengths=(4096,)))
    with pytest.raises(ValueError, match="is not finished"):
        make_report(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no report yet"):
        cli.run(["report", str(tmp_path / "out")])
    with pytest.raises(FileNotFoundError, match="holds no conversion"):
        cli.run(["report", str(place / "llama")])


def test_settings_that_an_earlier_version_wrote_are_read(place, tmp_path):
    refused(place, tmp_path / "out", "nothing is left", report=dataclasses.replace(REPORT, lengths=(4096,)))
    file = tmp_path / "out" / "conversion.json"
    record = json.loads(file.read_text())
    del record["settings"]["mag"]["order"], record["settings"]["report"]["piece_tokens"]
    file.write_text(json.dumps(record))
    assert load_conversion(tmp_path / "out").mag.order == 1
    assert load_conversion(tmp_path / "out").report == dataclasses.replace(REPORT, lengths=(4096,), piece_tokens=1024)


def test_an_interruption_between_stages_says_that_the_command_goes_on(place, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastweight.conversion.run.open_backbone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.run(["convert", str(place / "llama"), "--data", "x", "--out", str(tmp_path / "out")])
    assert "the same command goes on" in capsys.readouterr().err


def test_a_report_can_be_made_of_a_conversion_that_was_to_have_none(place, tmp_path, monkeypatch):
    monkeypatch.setattr("fastweight.conversion.result.ReportSettings", lambda: REPORT)
    attempt(place, tmp_path / "out", report=None, control=False)
    assert make_report(tmp_path / "out", quiet=True, say=lambda line: None).settings["lengths"] == [16, 48]


def test_relative_paths_hold_in_another_folder(place, tmp_path, monkeypatch):
    from fastweight.data import prepare

    prepare(str(place / "text.jsonl"), str(place / "llama"), tmp_path / "store", heldout_fraction=0.2)
    shutil.copytree(place / "llama", tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    given = {"source": "llama", "data": "store", "report": None, "control": False}
    attempt(place, tmp_path / "out", **given)
    file = tmp_path / "out" / "conversion.json"
    record = json.loads(file.read_text())
    monkeypatch.chdir(place)
    monkeypatch.setattr("fastweight.conversion.result.ReportSettings", lambda: REPORT)
    assert make_report(tmp_path / "out", quiet=True, say=lambda line: None).settings["lengths"] == [16, 48]
    attempt(place, tmp_path / "out", **given | {"source": str(tmp_path / "llama"), "data": str(tmp_path / "store")})
    record["settings"] |= {"source": "llama", "data": "store"}  # as an earlier version wrote them
    file.write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    attempt(place, tmp_path / "out", **given)


@pytest.mark.parametrize("recipe", ["mag", "in-place"])
def test_the_help_says_that_a_number_is_a_block(capsys, recipe):
    with pytest.raises(SystemExit):
        cli.run(["convert", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "how many, spread evenly" not in text
    assert {"mag": "numbers of blocks from 0", "in-place": "their numbers from 0"}[recipe] in text
