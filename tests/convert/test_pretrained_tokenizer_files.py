"""What transformers reads beside a tokenizer.json goes where the tokenizer goes."""

import json
import shutil

import pytest

from fastweight import cli
from fastweight.convert.pretrained.tokenizer import load_pretrained_tokenizer, put_for_transformers
from fastweight.data import load_tokenizer

pytest.importorskip("transformers")
from tptt.backbones import folder_with_tokenizer  # needs transformers

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def source(tmp_path):
    folder = folder_with_tokenizer(tmp_path / "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_tokenizer_is_kept_with_its_chat_template_and_reads_as_before(source, tmp_path):
    tokenizer = load_pretrained_tokenizer(source, keep=tmp_path / "kept")
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == TEMPLATE
    assert load_tokenizer(tmp_path / "kept").hash == tokenizer.hash


def test_imported_and_exported_a_tokenizer_still_knows_its_chat_template(source, tmp_path):
    from transformers import AutoTokenizer

    cli.run(["import", str(source), str(tmp_path / "model"), "--format", "hf"])
    cli.run(["export", str(tmp_path / "model"), str(tmp_path / "plain"), "--to", "hf"])
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template == TEMPLATE


def test_special_tokens_that_no_file_names_are_those_of_the_config(source, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "bare").mkdir()
    shutil.copy(source / "tokenizer.json", tmp_path / "bare")
    put_for_transformers(tmp_path / "bare", source)
    (source / "tokenizer_config.json").unlink()
    put_for_transformers(tmp_path / "bare", source)
    read = AutoTokenizer.from_pretrained(source)
    assert (read.bos_token, read.eos_token) == ("<|begin|>", "<|end|>")


def test_a_pointer_to_a_program_is_not_passed_on(source, tmp_path):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["a.B", None]}}))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    put_for_transformers(source, tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
